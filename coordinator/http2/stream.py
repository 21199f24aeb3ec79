"""One request as it arrives, and the way back; the connection does what is said here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol


class Transmitting(Protocol):
    """What a stream needs of its connection."""

    peer: str
    state: Any

    def acted(self, verdict: Any) -> Any: ...

    def sent(self, stream: int, data: bytes, offset: int) -> tuple[int, bool]: ...

    def consumed(self, stream: int, size: int, budgeted: bool) -> None: ...

    def flush(self) -> None: ...


class Gone(Exception):
    """The client has reset the stream, or its connection is lost."""


class Stream:
    """A request as it arrives, and the way back."""

    def __init__(self, connection: Transmitting) -> None:
        self.id = 0
        self.head: Any = None  # httpunk's frame: method, path, headers
        self.task: asyncio.Task[None] | None = None  # that serves it
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        self.writer: asyncio.Future[None] | None = None  # who waits for room
        self._connection = connection
        self._chunks: deque[tuple[bytes, bool]] = deque()
        self._ended = False
        self._reader: asyncio.Future[None] | None = None

    # ---- the request

    @property
    def peer(self) -> str:
        return self._connection.peer

    async def chunk(self) -> bytes | None:
        """The next piece of the body, None at its end. Raises Gone."""
        while not self._chunks:
            if self.gone:
                raise Gone
            if self._ended:
                return None
            self._connection.flush()  # the client may wait for the room that was made
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        data, budgeted = self._chunks.popleft()
        self._connection.consumed(self.id, len(data), budgeted)
        return data

    def arrived(self, data: bytes | None, budgeted: bool, ended: bool) -> None:
        if data is not None:
            self._chunks.append((data, budgeted))
        self._ended = self._ended or ended
        if self._reader is not None:
            _wake(self._reader)

    def writable(self) -> None:
        _wake(self.writer)

    def stop(self) -> None:
        """The client takes no answer any more."""
        if not self.gone:
            self.gone = True
            _wake(self._reader)
            _wake(self.writer)
            if self.on_gone is not None:
                self.on_gone()

    # ---- the answer

    def begin(self, fields: Any, *, end: bool = False) -> None:
        """Status 200 and ``fields``, a HeaderMap; nothing else follows when ``end``. Raises Gone."""
        self._connection.acted(self._connection.state.send_response_head(self.id, 200, fields, end))

    async def send(self, data: bytes) -> None:
        """Waits while the client has no room for it. Raises Gone."""
        offset = 0
        while True:
            offset, done = self._connection.sent(self.id, data, offset)
            if done:
                return
            self.writer = asyncio.get_running_loop().create_future()
            self._connection.flush()  # which may make room
            await self.writer
            if self.gone:
                raise Gone

    def end(self, trailers: Any) -> None:
        """Raises Gone."""
        self._connection.acted(self._connection.state.send_trailers(self.id, trailers))

    def flush(self) -> None:
        """Lets what was sent go."""
        self._connection.flush()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
