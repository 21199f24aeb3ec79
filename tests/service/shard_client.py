"""A coordinator reduced to its protocol: raw calls to ``shardd``, each with a deadline, for tests."""

from __future__ import annotations

import fcntl
import mmap
import os
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2, shard_pb2_grpc, tensor_pb2

SECONDS = 20.0
DTYPES = {"float32": tensor_pb2.FLOAT32, "int64": tensor_pb2.INT64, "float64": tensor_pb2.FLOAT64}
NUMPY = {value: name for name, value in DTYPES.items()}


def wire(name: str, value: np.ndarray, data: bool = True) -> tensor_pb2.Tensor:
    tensor = tensor_pb2.Tensor(name=name, dtype=DTYPES[str(value.dtype)], shape=value.shape)
    if data:
        tensor.data = value.tobytes()
    return tensor


def array(tensor: tensor_pb2.Tensor, data: bytes | None = None) -> np.ndarray:
    return np.frombuffer(tensor.data if data is None else data, NUMPY[tensor.dtype]).reshape(tuple(tensor.shape))


class StreamChannel:
    """The ordered channel of one rank in one generation."""

    def __init__(self, stub: shard_pb2_grpc.ShardStub, generation: int, owner: str) -> None:
        self.generation = generation
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        self._in: queue.SimpleQueue = queue.SimpleQueue()
        self.call = stub.Execute(iter(self._out.get, None))
        self.send(0, open=shard_pb2.OpenChannel(owner=owner))
        self.call.initial_metadata()  # sent once the channel is open, or never
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, seq: int, generation: int | None = None, **command) -> None:
        number = self.generation if generation is None else generation
        self._out.put(shard_pb2.ChannelRequest(generation=number, seq=seq, **command))

    def receive(self, seconds: float = SECONDS) -> shard_pb2.ChannelResponse | grpc.RpcError | None:
        """The next response; None at the end of the stream, or the error that it ended with."""
        return self._in.get(timeout=seconds)

    def close(self) -> None:
        self._out.put(None)
        self.call.cancel()

    def _read(self) -> None:
        try:
            for response in self.call:
                self._in.put(response)
            self._in.put(None)
        except grpc.RpcError as error:
            self._in.put(error)


class LocalChannel:
    """The same over the daemon's Unix socket: inputs in one memfd for all ranks, outputs in one for each."""

    def __init__(self, rank: Rank, generation: int, inputs: int, size: int = 1 << 20) -> None:
        request = shard_pb2.OpenLocalChannelRequest(generation=generation, owner=rank.owner)
        opened = rank.stub.OpenLocalChannel(request, timeout=SECONDS)
        self.generation = generation
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(SECONDS)
        self.socket.connect("\0" + opened.socket_path[1:])
        outputs = sealed_memory(size)
        self.outputs = mmap.mmap(outputs, size)
        socket.send_fds(self.socket, [opened.token.encode()], [inputs, outputs])
        os.close(outputs)
        answer = self.receive()
        assert answer.HasField("done"), answer

    def send(self, seq: int, generation: int | None = None, **command) -> None:
        number = self.generation if generation is None else generation
        self.socket.send(shard_pb2.ChannelRequest(generation=number, seq=seq, **command).SerializeToString())

    def receive(self) -> shard_pb2.ChannelResponse | None:
        data, descriptors, *_ = socket.recv_fds(self.socket, 1 << 20, 4)
        self.attached = descriptors
        return shard_pb2.ChannelResponse.FromString(data) if data else None

    def array(self, response: shard_pb2.ChannelResponse, index: int = 0) -> np.ndarray:
        """A copy of an output, from wherever it is."""
        tensor = response.execute.outputs[index]
        if not response.execute.arena_outputs:
            return array(tensor)
        ref = response.execute.arena_outputs[index]
        memory = self.outputs
        if ref.segment == 0xFFFFFFFF:
            memory = mmap.mmap(self.attached[0], 0)
            os.close(self.attached[0])
        return array(tensor, memory[ref.offset : ref.offset + ref.byte_size])

    def close(self) -> None:
        self.socket.close()


def sealed_memory(size: int, seals: int = 2) -> int:
    """A memfd of ``size`` bytes, sealed against shrinking."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    if seals:
        fcntl.fcntl(descriptor, 1033, seals)
    return descriptor


class Rank:
    """One daemon's RPCs."""

    def __init__(self, address: str, owner: str = "tester", metadata: tuple = (), credentials=None) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.grpc = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self.stub = shard_pb2_grpc.ShardStub(self.grpc)
        self.owner = owner
        self.lease_ms = 3000
        self.metadata = metadata

    def lease(self) -> shard_pb2.Lease:
        return shard_pb2.Lease(owner=self.owner, duration_milliseconds=self.lease_ms)

    def status(self, renew: bool = False, seconds: float = SECONDS) -> shard_pb2.StatusResponse:
        request = shard_pb2.StatusRequest(lease=self.lease() if renew else None)
        return self.stub.Status(request, timeout=seconds, metadata=self.metadata, wait_for_ready=True)

    def load(self, name: str, path: str, version: str = "1", options=None, **fields) -> shard_pb2.LoadedModel:
        *_, last = self.load_stream(name, path, version, options, **fields)
        assert last.stage == "loaded", last
        return last.model

    def load_stream(self, name: str, path: str, version: str = "1", options=None, **fields):
        request = shard_pb2.ShardLoadRequest(
            name=name, version=version, path=path, options=options or coordinator_pb2.LoadOptions(), **fields
        )
        return self.stub.Load(iter([request]), timeout=60, metadata=self.metadata)

    def export_plan(self, name: str, version: str = "1", seconds: float = SECONDS) -> bytes:
        request = shard_pb2.ExportPlanRequest(name=name, version=version)
        return b"".join(part.data for part in self.stub.ExportPlan(request, timeout=seconds, metadata=self.metadata))

    def fence(self, generation: int, reason: str = "test") -> shard_pb2.FenceResponse:
        request = shard_pb2.FenceRequest(generation=generation, lease=self.lease(), reason=reason)
        return self.stub.Fence(request, timeout=SECONDS, metadata=self.metadata)

    def join(self, generation: int, store: str, models=(), milliseconds: int = 10_000) -> shard_pb2.JoinResponse:
        request = shard_pb2.JoinRequest(
            generation=generation,
            owner=self.owner,
            store_address=store,
            timeout_milliseconds=milliseconds,
            models=models,
        )
        return self.stub.Join(request, timeout=SECONDS, metadata=self.metadata)

    def open(self, generation: int) -> StreamChannel:
        return StreamChannel(self.stub, generation, self.owner)

    def close(self) -> None:
        self.grpc.close()


class Ranks:
    """All daemons, as the coordinator of a generation sees them."""

    def __init__(self, addresses: list[str], owner: str = "tester") -> None:
        self.ranks = [Rank(address, owner) for address in addresses]
        self.channels: list[StreamChannel] = []
        self.generation = 0
        self.seq = 0
        self._pool = ThreadPoolExecutor(len(self.ranks))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self.channels:
            channel.close()
        for rank in self.ranks:
            rank.close()
        self._pool.shutdown()

    def __getitem__(self, rank: int) -> Rank:
        return self.ranks[rank]

    def all(self, call) -> list:
        """``call(rank)`` for all at once; raises the first error."""
        return list(self._pool.map(call, self.ranks))

    def load(self, name: str, path: str, version: str = "1", options=None) -> list[shard_pb2.LoadedModel]:
        return self.all(lambda rank: rank.load(name, path, version, options))

    def form(self) -> list[str]:
        """Fence and join the next generation with every model that is loaded everywhere, and open the channels."""
        backends = self.form_without_channels()
        self.channels = self.all(lambda rank: rank.open(self.generation))
        return backends

    def form_without_channels(self) -> list[str]:
        states = self.all(Rank.status)
        self.generation = max(state.highest_generation for state in states) + 1
        fenced = self.all(lambda rank: rank.fence(self.generation))
        assert all(response.accepted for response in fenced), fenced
        store = self.all(Rank.status)[0].store_address
        models = [
            [
                shard_pb2.JoinModel(name=model.name, version=model.version, source_digest=model.source_digest)
                for model in state.models
            ]
            for state in states
        ]
        names = set.intersection(*({(m.name, m.version) for m in each} for each in models))
        common = [model for model in models[0] if (model.name, model.version) in names]
        joined = self.all(lambda rank: rank.join(self.generation, store, common))
        self.seq = 0
        return [response.backend for response in joined]

    def send(self, **command) -> int:
        """The same command to every rank; returns its seq."""
        seq, self.seq = self.seq, self.seq + 1
        for channel in self.channels:
            channel.send(seq, **command)
        return seq

    def receive(self) -> list:
        return [channel.receive() for channel in self.channels]

    def run(self, **command) -> list:
        self.send(**command)
        return self.receive()

    def execute(self, model: str, version: str = "1", request_ids=("r",), outputs=(), **inputs) -> list:
        command = shard_pb2.ExecuteModel(
            model=model,
            version=version,
            inputs=[wire(name, value) for name, value in inputs.items()],
            request_ids=request_ids,
            outputs=outputs,
        )
        return self.run(execute=command)
