"""One rank's daemon as the coordinator knows it: its connections, and what its last heartbeat said."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator

import grpc

from coordinator.config import Config
from coordinator.logging import get_logger
from coordinator.security import channel_credentials, shard_metadata
from protos.tensor_parallel.v1 import shard_pb2 as pb
from protos.tensor_parallel.v1 import shard_pb2_grpc

RECONNECT_AFTER = 3  # timed-out heartbeats: a connection to a host that went away stays silent for minutes
LOST_INTERVAL = 0.05  # seconds between heartbeats to a rank that does not answer
LEASE_SHARE = 0.25  # of a lease, after which it is renewed whatever else was heard

_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.enable_http_proxy", 0),
    # A connection of its own for every channel: heartbeats must not queue behind payloads.
    ("grpc.use_local_subchannel_pool", 1),
)


class GivenUp(grpc.RpcError):
    """The connection was closed under a call, because the rank had been silent for too long."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "the connection was given up: the rank was silent for too long"


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """Around every call to a rank. Closing a connection cancels its calls, and gRPC then raises the very exception that
    means that the caller was cancelled; here it becomes a lost call. Raises GivenUp."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise GivenUp from None


class Rank:
    """``on_change(rank)`` is called when the rank becomes lost, comes back, answers as another process, or drains."""

    def __init__(self, index: int, address: str, config: Config, on_change: Callable[[Rank], None]) -> None:
        self.index = index
        self.address = address
        self.metadata = shard_metadata(config)
        self._config = config
        self._credentials = channel_credentials(config.shard_tls)
        self._on_change = on_change
        self._timeouts = 0
        self.status: pb.StatusResponse | None = None
        self.seen = 0.0
        self._answered_command = 0.0
        self.alive = False
        self.error = "has not answered yet"
        self.restarts = 0
        self._hurry = asyncio.Event()
        self._connect()

    def _connect(self) -> None:
        self._pulse_channel = self._channel()
        self.channel = self._channel()
        """Fence, Join, Load and Execute; Status has a connection of its own."""
        self._pulse = shard_pb2_grpc.ShardStub(self._pulse_channel)
        self.stub = shard_pb2_grpc.ShardStub(self.channel)

    def _channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        name = self._config.shard_tls_name
        override = (("grpc.ssl_target_name_override", name),) if name else ()
        return grpc.aio.secure_channel(self.address, self._credentials, options=(*_OPTIONS, *override))

    @property
    def draining(self) -> bool:
        """It answers still, and is about to leave."""
        return self.alive and self.status is not None and self.status.draining

    async def close(self) -> None:
        await asyncio.gather(self._pulse_channel.close(), self.channel.close())

    async def ask_status(self, lease: pb.Lease) -> pb.StatusResponse:
        """One heartbeat, recorded. Raises grpc.RpcError when the rank does not answer in time."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            with calling():
                status: pb.StatusResponse = await self._pulse.Status(
                    pb.StatusRequest(lease=lease), timeout=self._config.heartbeat_timeout, metadata=self.metadata
                )
        except grpc.RpcError as error:
            await self._missed(error, started)
            raise
        self._answered(status, loop.time())
        return status

    async def beat(self, lease: Callable[[], pb.Lease]) -> None:
        """Heartbeats for ever."""
        loop = asyncio.get_running_loop()
        last = -math.inf
        while True:
            if loop.time() >= self._next_beat(last):
                last = loop.time()
                with contextlib.suppress(grpc.RpcError):
                    await self.ask_status(lease())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._next_beat(last) - loop.time())):
                    await self._hurry.wait()
            self._hurry.clear()

    def _next_beat(self, last: float) -> float:
        """When to ask again after ``last``: an interval after the last sign of life, or when the lease calls for it.
        A heartbeat takes the rank's processor from its work, which shows better that it lives."""
        interval = self._config.heartbeat
        if not self.alive:
            return last + min(LOST_INTERVAL, interval)
        latest = last + max(interval, LEASE_SHARE * self._config.lease)
        return min(max(last, self._answered_command) + interval, latest)

    def heard(self, now: float) -> None:
        """The rank gave another sign of life at ``now``: it answered a command."""
        self.seen = self._answered_command = now

    def lost(self, reason: str) -> None:
        """Its channel has ended, most likely with it; a heartbeat, which goes out now, tells."""
        if self.alive:
            self._gone(reason)
            self._hurry.set()

    def _gone(self, reason: str) -> None:
        self.alive, self.error = False, reason
        get_logger().warning("rank_lost", rank=self.index, address=self.address, reason=reason)

    def _answered(self, status: pb.StatusResponse, now: float) -> None:
        before = self.status
        replaced = before is not None and before.incarnation != status.incarnation
        if replaced:
            self.restarts += 1
        back = not self.alive
        self.status, self.seen, self.alive, self.error, self._timeouts = status, now, True, "", 0
        if back or replaced:
            get_logger().info("rank_back", rank=self.index, pid=status.pid, address=self.address, replaced=replaced)
        if back or replaced or self.draining:
            self._on_change(self)

    async def _missed(self, error: grpc.RpcError, started: float) -> None:
        timed_out = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if timed_out and self.seen > started:
            return  # it answered a command meanwhile: slow, not gone
        self._timeouts = self._timeouts + 1 if timed_out else 0
        reason = f"no answer for {self._config.heartbeat_timeout:g} s" if timed_out else _reason(error)
        if self.alive:
            self._gone(reason)
            self._on_change(self)
        self.error = reason
        if self._timeouts >= RECONNECT_AFTER:
            self._timeouts = 0
            old = (self._pulse_channel, self.channel)
            self._connect()
            await asyncio.gather(*(channel.close() for channel in old))


def _reason(error: grpc.RpcError) -> str:
    details = error.details() or ""
    if "Connection refused" in details:
        return "connection refused"
    return f"{error.code().name}: {details}" if details else error.code().name
