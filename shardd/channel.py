"""The ordered channel of a generation, as the executor sees it, and its form over a gRPC stream.

The executor is the only one to call :meth:`Channel.receive`, :meth:`Channel.inputs` and :meth:`Channel.reply`; any
thread may close a channel, and a blocked ``receive`` then returns None. ``shardd.local_channel`` is the other form.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from protos.tensor_parallel.v1 import shard_pb2, tensor_pb2
from shardd import tensors
from shardd.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

PART_BYTES = 4 << 20
"""Outputs larger than this travel in parts of this size."""

Request = shard_pb2.ChannelRequest
Response = shard_pb2.ChannelResponse


class Channel(Protocol):
    """Commands in, answers out, in order."""

    def wait(self, seconds: float) -> bool:
        """Whether ``receive`` would return at once, perhaps after waiting for that for ``seconds``."""
        ...

    def receive(self) -> Request | None:
        """The next command; None once the channel has been closed, by either side."""
        ...

    def inputs(self, execute: shard_pb2.ExecuteModel) -> dict[str, torch.Tensor]:
        """The tensors of the command just received, on the CPU. Not to be written to, nor kept past ``reply``.

        Raises :class:`InvalidRequest` when bytes are missing, too many, or make no tensor.
        """
        ...

    def outputs(self, execute: shard_pb2.ExecuteModel, response: Response, values: Mapping[str, torch.Tensor]) -> None:
        """Copy ``values``, wherever they live, to where the caller will find them, and say so in ``response``."""
        ...

    def reply(self, response: Response) -> None:
        """Answer the command just received."""
        ...

    def close(self, reason: str) -> None:
        """Say ``Broken(reason)`` if the other side still listens, and end. Idempotent, from any thread."""
        ...

    def release(self) -> None:
        """Free what the channel holds. Called by the executor, after its last use of it."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the other side went away by itself."""
        ...


class StreamChannel:
    """The channel over ``Shard.Execute``: a reader thread takes commands in, the RPC's own thread sends answers out.

    The reader keeps one command ahead of the executor, so that the next one's bytes arrive while this one runs; gRPC's
    flow control holds back the rest. Tensors in parts are collected until the command that they belong to arrives.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self._commands: SimpleQueue[Request | None] = SimpleQueue()
        self._answers: SimpleQueue[Response | None] = SimpleQueue()
        self._room = threading.Semaphore(2)
        self._parts: dict[str, list[bytes]] = {}
        self._closed = threading.Lock()
        self._lost = False

    @property
    def lost(self) -> bool:
        return self._lost

    def feed(self, requests: Iterator[Request]) -> None:
        """Take commands from ``requests`` until they end; the body of the reader thread."""
        try:
            for request in requests:
                if not request.HasField("part"):
                    self._room.acquire()
                self._commands.put(request)
        except Exception:  # gRPC raises a bare exception when the call has ended
            pass
        self.hang_up()

    def hang_up(self) -> None:
        """The other side has gone."""
        self._lost = True
        self._commands.put(None)
        self._room.release()

    def answers(self) -> Iterator[Response]:
        """What to send, until the channel is closed; the body of the RPC."""
        while (response := self._answers.get()) is not None:
            yield response

    def wait(self, seconds: float) -> bool:
        return not self._commands.empty()

    def receive(self) -> Request | None:
        parts: defaultdict[str, list[bytes]] = defaultdict(list)
        position: defaultdict[str, int] = defaultdict(int)
        seq: int | None = None
        while (request := self._commands.get()) is not None:
            if not request.HasField("part"):
                self._room.release()
                self._parts = parts if seq is None or seq == request.seq else {}
                return request
            part = request.part
            # A part out of place is left out: the command then lacks bytes, and says so.
            if part.offset == position[part.tensor] and (seq is None or seq == request.seq):
                seq = request.seq
                parts[part.tensor].append(part.data)
                position[part.tensor] += len(part.data)
        return None

    def inputs(self, execute: shard_pb2.ExecuteModel) -> dict[str, torch.Tensor]:
        parts, self._parts = self._parts, {}
        values: dict[str, torch.Tensor] = {}
        for tensor in execute.inputs:
            if tensor.name in values:
                raise InvalidRequest(f"input {tensor.name!r} came twice")
            if tensor.name in parts:
                values[tensor.name] = tensors.join_parts(tensor, parts.pop(tensor.name))
            else:
                values[tensor.name] = whole(tensor)
        if parts:
            raise InvalidRequest(f"parts came of {', '.join(map(repr, parts))}, which the command does not name")
        return values

    def outputs(self, execute: shard_pb2.ExecuteModel, response: Response, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in zip(values, tensors.to_host(list(values.values())), strict=True):
            tensor = tensors.describe(response.execute.outputs, name, value)
            data = tensors.raw(value)
            if len(data) <= PART_BYTES:
                tensor.data = bytes(data)
            else:
                self._send_parts(response, name, data)

    def reply(self, response: Response) -> None:
        self._answers.put(response)

    def release(self) -> None:
        pass

    def _send_parts(self, response: Response, name: str, data: memoryview) -> None:
        for offset in range(0, len(data), PART_BYTES):
            piece = bytes(data[offset : offset + PART_BYTES])
            part = shard_pb2.TensorPart(tensor=name, offset=offset, data=piece)
            self._answers.put(Response(generation=response.generation, seq=response.seq, part=part))

    def close(self, reason: str) -> None:
        if not self._closed.acquire(blocking=False):
            return
        self._answers.put(Response(generation=self.generation, broken=shard_pb2.Broken(reason=reason)))
        self._answers.put(None)
        self._commands.put(None)
        self._room.release()


def whole(tensor: tensor_pb2.Tensor) -> torch.Tensor:
    """A tensor whose bytes came with it."""
    data = tensor.data
    tensors.check_size(tensor, data)
    return tensors.decode(tensor, data)
