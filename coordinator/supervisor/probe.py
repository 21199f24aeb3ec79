"""Whether a child answers, and whether one that does not is hung or merely busy."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2

_CHECK = "/grpc.health.v1.Health/Check"
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_ANSWERS = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)


class Answer(Enum):
    SILENT = "silent"  # no answer in time
    ALIVE = "alive"
    READY = "ready"


class Probe:
    """Asks one process's ``grpc.health.v1`` at ``address``."""

    def __init__(self, address: str, liveness: str, readiness: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._check: Any = self._channel.unary_unary(
            _CHECK,
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        self._liveness, self._readiness = liveness, readiness

    async def ask(self, bound: float, *, readiness: bool) -> Answer:
        """READY only if ``readiness`` is asked for. Any answer shows life, even one that knows no such service."""
        if not await self._one(self._liveness, bound, any_answer=True):
            return Answer.SILENT
        if readiness and await self._one(self._readiness, bound, any_answer=False):
            return Answer.READY
        return Answer.ALIVE

    async def _one(self, service: str, bound: float, *, any_answer: bool) -> bool:
        try:
            answer = await self._check(health_pb2.HealthCheckRequest(service=service), timeout=bound)
        except grpc.aio.AioRpcError as error:
            return any_answer and error.code() in _ANSWERS
        return any_answer or answer.status == health_pb2.HealthCheckResponse.SERVING

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()


def busy(pid: int) -> bool:
    """True if any thread of ``pid`` is running or waiting for the disk right now; False for stopped, idle or gone.

    A daemon that does not answer because it computes without letting go of the interpreter, or because the machine is
    overloaded, gets more time than one that is stopped or waits for a lock that nobody will release.
    """
    try:
        return any(_state(thread) in ("R", "D") for thread in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False


def stopped(pid: int) -> bool:
    """Whether somebody has stopped the process, as with SIGSTOP. Costs it nothing, and the caller little."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read(512).rpartition(b") ")[2].startswith(b"T")
    except OSError:
        return False


def _state(thread: Path) -> str:
    try:
        # "pid (name) state ...", where the name may hold spaces and parentheses
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
