"""The messages of a gRPC body: a byte that tells whether it is compressed, four of length, and the bytes."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import numpy as np

from coordinator.types import Buffer

_PREFIX = struct.Struct(">BI")
IDENTITY = b"identity"
_LARGE = 256 << 10  # bytes; from here on a message is put together while it arrives
_SHARE = 8  # of a large message one part in so many is there before all of its memory is taken
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
ENCODINGS = (IDENTITY, *_WINDOW_BITS)


class BodyError(Exception):
    """A body that is refused: ``code`` and ``message`` for the client."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def prefix(size: int) -> bytes:
    """What stands before an uncompressed message of ``size`` bytes. Raises BodyError at 4 GiB."""
    if size >= 1 << 32:
        raise BodyError(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"the message has {size} bytes; gRPC's messages have < 4 GiB"
        )
    return _PREFIX.pack(0, size)


class Messages:
    """Iterates over the messages of a body that arrives in chunks cut anywhere; ``chunk`` gives the next, then None.

    ``encoding`` is that of the field ``grpc-encoding``, ``limit`` the most bytes a message may have, unpacked too.
    Iterating raises BodyError; when it is cancelled, the next time goes on with the same message.
    """

    def __init__(self, chunk: Callable[[], Awaitable[bytes | None]], encoding: bytes, limit: int) -> None:
        self._chunk = chunk
        self._encoding = encoding
        self._limit = limit
        self._held: deque[bytes] = deque()
        self._start = 0  # bytes of the first chunk that are taken
        self._size = 0
        self._head: tuple[int, int] | None = None  # of the message that is arriving
        self._whole: memoryview | None = None  # it, while it is put together
        self._there = 0  # bytes of it

    def __aiter__(self) -> AsyncIterator[Buffer]:
        return self

    async def __anext__(self) -> Buffer:
        if self._head is None:
            if not await self._fill(_PREFIX.size):
                if self._size:
                    raise BodyError(grpc.StatusCode.INVALID_ARGUMENT, "the request ends within a message's prefix")
                raise StopAsyncIteration
            self._head = _PREFIX.unpack(self._take(_PREFIX.size))
        compressed, size = self._head
        if size > self._limit:
            raise _too_large(f"{size}", self._limit)
        if self._whole is None and not await self._fill(size if size < _LARGE else size // _SHARE):
            raise _cut(self._size, size)
        if compressed == 0 and size >= _LARGE:
            return await self._gathered(size)
        if not await self._fill(size):
            raise _cut(self._size, size)
        data, self._head = self._take(size), None
        if compressed == 0:
            return data
        if compressed != 1:
            raise BodyError(grpc.StatusCode.INVALID_ARGUMENT, f"a message's first byte is {compressed}, not 0 or 1")
        return self._unpacked(data)

    async def only(self) -> Buffer:
        """The one message of a unary request."""
        first = await self._chunk()
        if first is not None:
            rest = b""
            if _is_message(first) and len(first) <= self._limit:
                more = await self._chunk()
                if more is None:
                    return first[_PREFIX.size :]  # as nearly every small request comes
                rest = more
            self._hold(first)
            self._hold(rest)
        try:
            data = await self.__anext__()
        except StopAsyncIteration:
            raise BodyError(grpc.StatusCode.INVALID_ARGUMENT, "the request has no message") from None
        if await self._fill(1):
            raise BodyError(grpc.StatusCode.INVALID_ARGUMENT, "the request has more than one message")
        return data

    async def _fill(self, size: int) -> bool:
        """Whether ``size`` bytes came before the end."""
        while self._size < size:
            chunk = await self._chunk()
            if chunk is None:
                return False
            self._hold(chunk)
        return True

    def _hold(self, chunk: bytes) -> None:
        if chunk:  # the end of a body may be a frame without bytes
            self._held.append(chunk)
            self._size += len(chunk)

    async def _gathered(self, size: int) -> memoryview:
        """A large message, put together while it arrives: to join its chunks at the end takes time that nobody else
        uses."""
        if self._whole is None:
            self._whole, self._there = np.empty(size, np.uint8).data, 0
        whole = self._whole
        while (at := self._there) < size:
            if not await self._fill(1):
                raise _cut(at, size)
            piece = self._take(min(len(self._held[0]) - self._start, size - at))
            whole[at : at + len(piece)] = piece
            self._there += len(piece)
        self._head = self._whole = None
        return whole.toreadonly()

    def _take(self, size: int) -> bytes:
        self._size -= size
        taken = []
        while size:
            chunk = self._held[0]
            piece = chunk[self._start : self._start + size]
            self._start += len(piece)
            if self._start == len(chunk):
                self._held.popleft()
                self._start = 0
            taken.append(piece)
            size -= len(piece)
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _unpacked(self, data: bytes) -> bytes:
        bits = _WINDOW_BITS.get(self._encoding)
        if bits is None:
            raise BodyError(grpc.StatusCode.INVALID_ARGUMENT, "a message is compressed, but grpc-encoding is identity")
        unpacker = zlib.decompressobj(bits)
        try:
            unpacked = unpacker.decompress(data, self._limit + 1)
        except zlib.error:
            unpacked = b""
        if len(unpacked) > self._limit:
            raise _too_large("more", self._limit)
        if not unpacker.eof:
            name = self._encoding.decode()
            raise BodyError(grpc.StatusCode.INVALID_ARGUMENT, f"a message cannot be unpacked as {name}")
        return unpacked


def _cut(got: int, size: int) -> BodyError:
    return BodyError(grpc.StatusCode.INVALID_ARGUMENT, f"the request ends after {got} of a message's {size} bytes")


def _is_message(chunk: bytes) -> bool:
    """Whether it is one whole message, uncompressed."""
    size = _PREFIX.size
    return len(chunk) >= size and not chunk[0] and int.from_bytes(chunk[1:size], "big") == len(chunk) - size


def _too_large(size: str, limit: int) -> BodyError:
    return BodyError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max ({size} vs. {limit})")
