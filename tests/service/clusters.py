"""A coordinator over daemons, as real processes, and what tests say to it.

with Cluster(2, tmp_path, model_root=models) as cluster:
    cluster.load("m", "tests.service.shard_models:mlp", kind="factory")
    cluster.forward("m", {"x": array})["output"]
    cluster.coordinator.kill(); cluster.restart_coordinator()
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np

from coordinator.dtypes import DataType, from_numpy
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import coordinator_pb2_grpc
from tests.service.daemons import DaemonProcess, Daemons, wait_for

FACTORIES = (
    *("shard_models:mlp", "shard_models:moody", "shard_models:picky", "shard_models:sabotaged"),
    *("shard_models:gated", "shard_models:deep"),
    *("coordinator_models:time_first", "coordinator_models:head", "coordinator_models:paired"),
)
CHANNEL = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


class CoordinatorProcess(DaemonProcess):
    """A coordinator that listens once ``await_address`` returns."""

    def __init__(self, shards: Sequence[str], directory: Path, *, arguments: Sequence[str] = (), listen="127.0.0.1:0"):
        self.port_file = directory / "coordinator.port"
        self.port_file.unlink(missing_ok=True)
        flags = ["--listen", listen, "--port-file", str(self.port_file), "--log-format", "json"]
        shard_flags = [flag for shard in shards for flag in ("--shard", shard)]
        super().__init__([*flags, *shard_flags, *arguments], log=directory / "coordinator.log", module="coordinator")
        self.address = ""

    def await_address(self) -> str:
        wait_for(lambda: self.port_file.exists() or not self.alive, "the coordinator to listen", every=0.002)
        assert self.port_file.exists(), f"the coordinator did not start:\n{self.log()}"
        self.address = self.port_file.read_text().strip()
        return self.address


class Caller:
    """A plain client: what it sends and receives is visible in the tests that use it."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, options=CHANNEL)
        self.stub = coordinator_pb2_grpc.CoordinatorStub(self.channel)

    def load(self, name: str, path: str, *, version: str = "", timeout: float = 40, **options) -> list[pb.LoadProgress]:
        batching = options.pop("batching", None)
        request = pb.LoadRequest(name=name, path=path, version=version, options=pb.LoadOptions(**options))
        if batching:
            request.options.batching.CopyFrom(pb.BatchingOptions(**batching))
        return list(self.stub.Load(request, timeout=timeout))

    def forward(self, name: str, inputs: Mapping[str, np.ndarray], *, timeout: float = 20, **fields) -> dict:
        return arrays(self.stub.Forward(forward_request(name, inputs, **fields), timeout=timeout))

    def health(self) -> pb.HealthResponse:
        return self.stub.Health(pb.HealthRequest(), timeout=5)

    def close(self) -> None:
        self.channel.close()


def forward_request(name: str, inputs: Mapping[str, np.ndarray], **fields) -> pb.ForwardRequest:
    request = pb.ForwardRequest(model=name, **fields)
    for key, value in inputs.items():
        dtype = int(from_numpy(value.dtype))
        request.inputs.add(name=key, dtype=dtype, shape=value.shape, data=np.ascontiguousarray(value).tobytes())
    return request


def arrays(response: pb.ForwardResponse) -> dict[str, np.ndarray]:
    return {
        tensor.name: np.frombuffer(tensor.data, DataType(tensor.dtype).storage_dtype).reshape(tensor.shape)
        for tensor in response.outputs
    }


def failure(call) -> grpc.RpcError:
    """The RpcError that ``call()`` raises."""
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call did not fail")


class Cluster(Caller):
    """``ranks`` daemons and a coordinator, ready when entered."""

    def __init__(
        self,
        ranks: int,
        directory: Path,
        *,
        model_root: Path | None = None,
        arguments: Sequence[str] = (),
        daemon_arguments: Sequence[str] = (),
        module: str = "shardd",
        env: Mapping[str, str] | None = None,
        await_serving: bool = True,
    ) -> None:
        self.directory = directory
        self._await = await_serving
        self.arguments = list(arguments)
        factories = [f"--allow-factory=tests.service.{name}" for name in FACTORIES]
        self.daemons = Daemons(
            ranks, directory, model_root=model_root, arguments=[*factories, *daemon_arguments], module=module, env=env
        )

    def __enter__(self) -> Cluster:
        self.daemons.__enter__()
        try:
            self.coordinator = self.start_coordinator()
            super().__init__(self.coordinator.await_address())
            if self._await:
                self.await_serving()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *about) -> None:
        if hasattr(self, "channel"):
            self.close()
        if hasattr(self, "coordinator"):
            self.coordinator.close()
        self.daemons.__exit__(None, None, None)

    def start_coordinator(self, listen: str = "127.0.0.1:0") -> CoordinatorProcess:
        return CoordinatorProcess(self.daemons.addresses, self.directory, arguments=self.arguments, listen=listen)

    def restart_coordinator(self) -> None:
        """SIGKILL, and another one at the same address."""
        self.coordinator.kill()
        self.coordinator = self.start_coordinator(self.coordinator.address)
        self.coordinator.await_address()

    def await_serving(self, seconds: float = 50) -> pb.HealthResponse:
        return wait_for(lambda: self._healthy(True), f"health to be SERVING: {self.coordinator.log()[-3000:]}", seconds)

    def await_not_serving(self, seconds: float = 20) -> pb.HealthResponse:
        return wait_for(lambda: self._healthy(False), "health to be NOT_SERVING", seconds, every=0.005)

    def _healthy(self, wanted: bool) -> pb.HealthResponse | None:
        try:
            health = self.health()
        except grpc.RpcError:
            return None
        return health if health.serving is wanted else None


def seconds_since(started: float) -> float:
    return time.monotonic() - started
