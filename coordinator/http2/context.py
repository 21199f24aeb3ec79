"""What a servicer is told of a call, and tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from coordinator.http2.fields import Metadata, fields_of
from coordinator.logging import get_logger

if TYPE_CHECKING:
    from coordinator.http2.call import Call


class Details(grpc.HandlerCallDetails):
    """Of which method, with which metadata."""

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class Aborted(grpc.aio.AbortError):
    """What ``abort`` raises; the status is in the context."""


class Context(grpc.aio.ServicerContext[Any, Any]):
    """The servicer's view of a call, as ``grpc.aio`` documents it."""

    def __init__(self, call: Call, metadata: Metadata, peer: str, ends: float | None) -> None:
        self._call = call
        self._metadata = metadata
        self._peer = peer
        self._ends = ends
        self.status: tuple[grpc.StatusCode, str] = (grpc.StatusCode.OK, "")
        self.trailing: Metadata = ()
        self.callbacks: list[Callable[[Any], None]] = []
        self.ended = False

    @property
    def takes_pieces(self) -> bool:
        """Whether a large answer may be a list of its pieces now. Not while many are on their way: whoever does not
        read them would keep the memory that they lie in from all others."""
        return self._call.takes_pieces

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, Any]] = ()
    ) -> NoReturn:
        if code is grpc.StatusCode.OK:
            code, details = grpc.StatusCode.UNKNOWN, "aborted with OK"
        self.status = (code, details)
        if trailing_metadata:
            self.trailing = tuple(trailing_metadata)
        raise Aborted(details)

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        await self.abort(status.code, status.details or "", status.trailing_metadata or ())

    async def read(self) -> Any:
        return await anext(self._call.requests, grpc.aio.EOF)

    async def write(self, message: Any) -> None:
        await self._call.write(message)

    async def send_initial_metadata(self, initial_metadata: Iterable[tuple[str, Any]]) -> None:
        self._call.begin(fields_of(initial_metadata))
        self._call.flush()

    def set_trailing_metadata(self, trailing_metadata: Iterable[tuple[str, Any]]) -> None:
        self.trailing = tuple(trailing_metadata)

    def invocation_metadata(self) -> Any:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = (code, self.status[1])

    def set_details(self, details: str) -> None:
        self.status = (self.status[0], details)

    def set_compression(self, compression: grpc.Compression) -> None:
        """Answers are never compressed."""

    def disable_next_message_compression(self) -> None:
        """Answers are never compressed."""

    def peer(self) -> str:
        return self._peer

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {}

    def time_remaining(self) -> float | None:  # type: ignore[override]  # the stub forgets calls without a deadline
        return None if self._ends is None else max(0.0, self._ends - asyncio.get_running_loop().time())

    def trailing_metadata(self) -> Any:
        return self.trailing

    def code(self) -> Any:
        return self.status[0]

    def details(self) -> str:
        return self.status[1]

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def cancelled(self) -> bool:
        return self.ended and self.status[0] is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self.ended

    def finished(self) -> None:
        self.ended = True
        for callback in self.callbacks:
            try:
                callback(self)
            except Exception as error:
                get_logger().error("internal_error", exc_info=error)
