"""What a call's stream brings: head, one message, trailers."""

from __future__ import annotations

import struct

import grpc
import numpy as np

from coordinator.client.transport.failures import CallFailed, code_of, of_http
from coordinator.http2.fields import MalformedField, Metadata, message_of, metadata_of

Fields = list[tuple[bytes, bytes]]

_PREFIX = struct.Struct(">BI")
_SMALL = 64 << 10  # bytes; larger memory is not zeroed first, and has pages of its own
_NO_MEMORY = memoryview(bytearray())


class Answer:
    """Filled by ``feed``, or read from the socket straight into ``room``, until ``ended``."""

    def __init__(self) -> None:
        self.ended = False
        self._status: int | None = None
        self._head: Fields | None = None
        self._trailers: Fields = []
        self._prefix = b""
        self._memory: memoryview | None = None
        self._got = 0

    # ---- as it arrives

    @property
    def begun(self) -> bool:
        return self._head is not None

    def fields(self, status: int | None, fields: Fields, last: bool) -> None:
        """The head, then the trailers; where nothing follows the head, it is the trailers as well."""
        if self._head is None:
            self._status, self._head = status, fields
        if last:
            self._trailers, self.ended = fields, True

    def feed(self, data: memoryview) -> None:
        """The next bytes of the body. Raises CallFailed."""
        while data:
            if self._memory is None:
                missing = _PREFIX.size - len(self._prefix)
                self._prefix += data[:missing]
                data = data[missing:]
                if len(self._prefix) == _PREFIX.size:
                    self._begin(*_PREFIX.unpack(self._prefix))
                continue
            piece = data[: len(self._memory) - self._got]
            if not piece:
                raise CallFailed(grpc.StatusCode.INTERNAL, "the answer has more than one message")
            self._memory[self._got : self._got + len(piece)] = piece
            self._got += len(piece)
            data = data[len(piece) :]

    def room(self) -> memoryview:
        """For the rest of the message, as far as its size is known; tell ``filled``."""
        return _NO_MEMORY if self._memory is None else self._memory[self._got :]

    def filled(self, size: int) -> None:
        self._got += size

    def _begin(self, compressed: int, size: int) -> None:
        if self._is_no_grpc():  # a web page, say; its first bytes are no size
            raise of_http(self._status, dict(self._head or ()).get(b"content-type", b""))
        if compressed:
            raise CallFailed(grpc.StatusCode.INTERNAL, "the answer is compressed, which was not asked for")
        try:
            self._memory = memoryview(bytearray(size)) if size < _SMALL else np.empty(size, np.uint8).data
        except MemoryError:
            message = f"the answer has {size} bytes, for which there is no memory"
            raise CallFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, message) from None

    def _is_no_grpc(self) -> bool:
        kind = dict(self._head or ()).get(b"content-type", b"")
        return self._status != 200 or not kind.startswith(b"application/grpc")

    # ---- when it has ended

    def message(self) -> memoryview:
        """Read-only, and the only reference to its memory. Raises CallFailed."""
        trailers = dict(self._trailers)
        status = trailers.get(b"grpc-status")
        if status is None:
            raise of_http(self._status, dict(self._head or ()).get(b"content-type", b""))
        if (code := code_of(status)) is not grpc.StatusCode.OK:
            raise CallFailed(code, message_of(trailers.get(b"grpc-message", b"")), _metadata(self._trailers))
        if self._memory is None or self._got < len(self._memory):
            raise CallFailed(grpc.StatusCode.INTERNAL, "the answer ended before its message did, with status OK")
        return self._memory.toreadonly()


def _metadata(fields: Fields) -> Metadata:
    try:
        return metadata_of(fields)
    except MalformedField:  # the status is worth more than a binary field of a server that is not ours
        return metadata_of((name, value) for name, value in fields if not name.endswith(b"-bin"))
