"""A link's bytes cut into HTTP/2 frames (RFC 9113, section 4)."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import grpc
from httpunk import _httpunk as h2

from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import CallFailed, violation
from coordinator.client.transport.link import CAPACITY, Link

MAX_FRAME = 1 << 20  # bytes of payload that a server may send in one
MAX_HEADER_LIST = 64 << 10  # bytes as HTTP/2 counts them, 32 more for each field
MAX_STREAM = (1 << 31) - 1

_HEADER = struct.Struct(">IBI")  # payload's size << 8 | kind, flags, stream
_DATA, _HEADERS, _CONTINUATION = 0, 1, 9
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_CALM = 11
_HTTP_1 = b"HTTP/1."


class Data(NamedTuple):
    """A DATA frame whose payload is still to be read: ``size`` bytes, and ``padding`` behind them."""

    stream: int
    size: int
    padding: int
    last: bool
    counted: int
    """Bytes of the server's window that it takes."""


def data_header(stream: int, size: int, last: bool) -> bytes:
    return _HEADER.pack(size << 8 | _DATA, _END_STREAM if last else 0, stream)


def headers_too_large(name: str) -> CallFailed:
    message = f"the answer of {name} has more than {MAX_HEADER_LIST} bytes of headers"
    return CallFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


class Framing:
    """``codec`` is httpunk's, which lays out and understands all frames but DATA."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._in_head = False  # the next frame has to go on with the head
        self._begun = False
        self.codec: Any = h2.H2Codec("client")
        self.codec.set_max_header_list_size(4 * MAX_HEADER_LIST)  # past it fields would be left out without a word
        self.codec.set_max_recv_frame_size(MAX_FRAME)

    def whole(self) -> bool:
        """Whether the next frame is here altogether, or will never be held as one."""
        held = self._link.held
        if held < _HEADER.size:
            return False
        size = _HEADER.size + (self._link.unpacked(_HEADER)[0] >> 8)
        return held >= size or size > CAPACITY

    def next(self, deadline: Deadline) -> Data | list[Any]:
        """The next frame, or what it completes. Raises CallFailed."""
        link = self._link
        link.need(_HEADER.size, deadline)
        first, flags, stream = link.unpacked(_HEADER)
        size, kind = first >> 8, first & 0xFF
        if kind == _DATA and self._begun and not self._in_head:
            link.take(_HEADER.size)
            return self._data(size, flags, stream & MAX_STREAM, deadline)
        whole = _HEADER.size + size
        if whole > CAPACITY:
            if kind in (_HEADERS, _CONTINUATION):
                raise headers_too_large(link.name)
            http1 = bytes(link.take(len(_HTTP_1))) == _HTTP_1
            raise violation(link.name, "it speaks HTTP/1" if http1 else f"a frame of kind {kind} has {size} bytes")
        link.need(whole, deadline)
        return self._understood(bytes(link.take(whole)), kind, flags)

    def _data(self, size: int, flags: int, stream: int, deadline: Deadline) -> Data:
        padding, left = 0, size
        if flags & _PADDED:
            self._link.need(1, deadline)
            padding = self._link.take(1)[0]
            left = size - 1 - padding
        if left < 0 or size > MAX_FRAME:
            raise violation(self._link.name, f"a frame of {size} bytes with {padding} of padding")
        return Data(stream, left, padding, bool(flags & _END_STREAM), size)

    def _understood(self, raw: bytes, kind: int, flags: int) -> list[Any]:
        if kind in (_HEADERS, _CONTINUATION):
            self._in_head = not flags & _END_HEADERS
        try:
            frames: list[Any] = self.codec.receive(raw)
        except h2.H2Error as error:
            if error.args[0] == _CALM:
                raise headers_too_large(self._link.name) from None
            raise violation(self._link.name, error.args[-1]) from None
        if frames and not self._begun:
            if type(frames[0]) is not h2.H2FrameSettings:
                raise violation(self._link.name, "its first frame is not SETTINGS")
            self._begun = True
        return frames
