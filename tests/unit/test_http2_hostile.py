"""The coordinator's own gRPC server against peers that speak HTTP/2 badly, or not at all: over raw sockets."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from httpunk import _httpunk as h2

from coordinator.http2 import connection
from tests.unit.test_http2 import LIMIT, Running, channel, running

__all__ = ["running"]  # the fixture

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
GRPC = ((":method", "POST"), (":scheme", "http"), (":path", "/t/echo"), (":authority", "x"), ("te", "trailers"))
CALL = (*GRPC, ("content-type", "application/grpc"))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def block(*fields: tuple[str, str]) -> bytes:
    """Fields as HPACK literals that no table remembers."""

    def text(value: str) -> bytes:
        raw = value.encode()
        size = bytes((len(raw),)) if len(raw) < 127 else b"\x7f" + _varint(len(raw) - 127)
        return size + raw

    return b"".join(b"\x00" + text(name) + text(value) for name, value in fields)


def _varint(value: int) -> bytes:
    made = b""
    while value >= 128:
        made += bytes((value % 128 + 128,))
        value //= 128
    return made + bytes((value,))


def message(data: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(data)) + data


MOST = 16 << 10  # bytes of a frame, before its sender has been told that there may be more


class Raw:
    """A peer that sends what it is told to."""

    def __init__(self, running: Running, *, greet: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", running.ports[0]), timeout=5)
        self._codec = h2.H2Codec("client")
        if greet:
            self.send(PREFACE + frame(SETTINGS, 0, 0))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def call(self, *fields: tuple[str, str], stream: int = 1, body: bytes = message(b"hi")) -> None:
        pieces = [body[start : start + MOST] for start in range(0, len(body), MOST)] or [b""]
        data = [frame(DATA, 0, stream, piece) for piece in pieces[:-1]] + [frame(DATA, END_STREAM, stream, pieces[-1])]
        self.send(frame(HEADERS, END_HEADERS, stream, block(*fields)) + b"".join(data))

    def frames(self) -> Iterator[Any]:
        """httpunk's frames; ends with the connection."""
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return
            if not data:
                return
            yield from self._codec.receive(data)

    def answer(self) -> dict[str, str]:
        """All fields of the answer on stream 1; empty if there is none."""
        found: dict[str, str] = {}
        for one in self.frames():
            if getattr(one, "stream_id", 0) != 1 or isinstance(one, h2.H2FrameWindowUpdate):
                continue
            if isinstance(one, h2.H2FrameRstStream):
                return {}
            if isinstance(one, h2.H2FrameHeaders):
                found |= {name: value.decode() for name, value in one.headers.items()}
                if one.end_stream:
                    return found
        return {}

    def ends(self) -> int | None:
        """The reason of the server's GOAWAY, None if it closed without a word."""
        return next((int(one.error_code) for one in self.frames() if isinstance(one, h2.H2FrameGoAway)), None)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture(autouse=True)
def _others_are_served(running: Running) -> Iterator[None]:
    """Whatever one peer does, another is answered."""
    yield
    with channel(running.target) as client:
        assert client.unary_unary("/t/echo")(b"x", timeout=10) == b"x"


def test_a_good_call(running: Running) -> None:
    with Raw(running) as raw:
        raw.call(*CALL)
        found = []
        for one in raw.frames():
            found += [one.data] if isinstance(one, h2.H2FrameData) else []
            if isinstance(one, h2.H2FrameHeaders) and one.end_stream:
                break
        assert b"".join(found) == message(b"hi")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((*GRPC, ("content-type", "text/plain")), grpc.StatusCode.UNKNOWN),
        (GRPC, grpc.StatusCode.UNKNOWN),
        ((*CALL[1:5], (":method", "GET")), None),  # pseudo-fields behind others: no request at all
        ((*CALL, ("grpc-timeout", "5 minutes")), grpc.StatusCode.INVALID_ARGUMENT),
        ((*CALL, ("grpc-timeout", "123456789S")), grpc.StatusCode.INVALID_ARGUMENT),
        ((*CALL, ("k-bin", "no base64!")), grpc.StatusCode.INVALID_ARGUMENT),
        ((*CALL, ("grpc-encoding", "br")), grpc.StatusCode.UNIMPLEMENTED),
        ((*CALL, ("Upper", "case")), None),
        ((*CALL, ("connection", "keep-alive")), None),
    ],
)
def test_heads_that_are_refused(
    running: Running, fields: tuple[tuple[str, str], ...], expected: grpc.StatusCode | None
) -> None:
    with Raw(running) as raw:
        raw.call(*fields)
        answer = raw.answer()
        assert answer.get("grpc-status") == (str(expected.value[0]) if expected is not None else None), answer


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "no message"),
        (b"\x00\x00", "prefix"),
        (message(b"hello")[:-2], "ends after 3"),
        (message(bytes(300_000))[:-2], "ends after 299998"),
        (message(bytes(300_000))[:100], "ends after 95"),
        (message(bytes(300_000)) + b"\x00", "more than one"),
        (message(bytes(300_000)) + message(b"x"), "more than one"),
        (message(b"a") + message(b"b"), "more than one"),
        (message(b"a", compressed=7), "first byte is 7"),
        (message(b"a", compressed=1), "identity"),
        (struct.pack(">BI", 0, LIMIT + 1), "larger than max"),
    ],
)
def test_bodies_that_are_no_message(running: Running, body: bytes, expected: str) -> None:
    with Raw(running) as raw:
        raw.call(*CALL, body=body)
        assert expected in raw.answer()["grpc-message"]


@pytest.mark.parametrize("got", [5, 100, 40_000, 299_990])
def test_a_large_message_whose_end_is_an_empty_frame(running: Running, got: int) -> None:
    body = message(bytes(300_000))[:got]
    with Raw(running) as raw:
        data = [frame(DATA, 0, 1, body[start : start + MOST]) for start in range(0, got, MOST)]
        raw.send(frame(HEADERS, END_HEADERS, 1, block(*CALL)) + b"".join(data) + frame(DATA, END_STREAM, 1))
        assert f"ends after {got - 5} of" in raw.answer()["grpc-message"]


def test_a_body_that_is_no_gzip(running: Running) -> None:
    with Raw(running) as raw:
        raw.call(*CALL, ("grpc-encoding", "gzip"), body=message(b"no gzip", compressed=1))
        assert "gzip" in raw.answer()["grpc-message"]


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", bytes(100)])
def test_other_protocols(running: Running, words: bytes) -> None:
    with Raw(running, greet=False) as raw:
        raw.send(words + bytes(64))
        assert raw.ends() in (None, 1)


def test_silence_is_ended(monkeypatch: pytest.MonkeyPatch, running: Running) -> None:
    monkeypatch.setattr(connection, "PREFACE", 0.2)
    with Raw(running, greet=False) as raw:
        assert raw.ends() is None


def test_bytes_one_at_a_time(running: Running) -> None:
    words = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, block(*CALL))
    with Raw(running, greet=False) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in words + frame(DATA, END_STREAM, 1, message(b"hi")):
            raw.send(bytes((byte,)))
        assert "grpc-status" in raw.answer()


@pytest.mark.parametrize(
    "words",
    [
        frame(DATA, 0, 1, b"x"),  # a stream that is not open
        frame(HEADERS, END_HEADERS, 2, block(*CALL)),  # a number that only servers may use
        frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),  # no HPACK
        frame(SETTINGS, 0, 0, b"\x00\x05\xff\xff\xff\xff"),  # a frame size that is not allowed
        frame(WINDOW_UPDATE, 0, 0, bytes(4)),
        frame(SETTINGS, 0, 0, b"123"),
        frame(CONTINUATION, 0, 1, b""),
        b"\xff\xff\xff" + bytes(6),  # 16 MiB in one frame
    ],
)
def test_broken_rules_end_the_connection(running: Running, words: bytes) -> None:
    with Raw(running) as raw:
        raw.send(words)
        assert raw.ends()


def test_a_head_without_end(running: Running) -> None:
    with Raw(running) as raw:
        raw.send(frame(HEADERS, 0, 1, block(*CALL)))
        _send_until_refused(raw, frame(CONTINUATION, 0, 1, block(("k", "v" * 8000))), 20_000)


def test_a_large_head_is_refused(running: Running) -> None:
    with Raw(running) as raw:
        half = block(("k", "v" * 12_000))
        raw.send(frame(HEADERS, 0, 1, block(*CALL) + half) + frame(CONTINUATION, END_HEADERS, 1, half))
        raw.send(frame(DATA, END_STREAM, 1, message(b"hi")))
        assert "more than 16384" in raw.answer()["grpc-message"]


def test_streams_that_are_reset_at_once(running: Running) -> None:
    with Raw(running) as raw:
        pairs = (
            frame(HEADERS, END_HEADERS, stream, block(*CALL)) + frame(RST_STREAM, 0, stream, bytes(4))
            for stream in range(1, 20_001, 2)
        )
        began = time.monotonic()
        with contextlib.suppress(OSError):  # the server may end it
            for pair in pairs:
                raw.send(pair)
        assert time.monotonic() - began < 30
    _until_no_calls(running)


def test_a_peer_that_pings_and_does_not_read(running: Running) -> None:
    with Raw(running) as raw:
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        _send_until_refused(raw, frame(PING, 0, 0, bytes(8)) * 1000, 20_000)


def _send_until_refused(raw: Raw, words: bytes, times: int) -> None:
    def flood() -> None:
        for _ in range(times):
            raw.send(words)

    with pytest.raises(OSError, match=r"reset|[Bb]roken pipe|timed out"):  # timed out: no more is taken
        flood()


def _until_no_calls(running: Running) -> None:
    deadline = time.monotonic() + 20
    while any(one.calls for one in running.server._connections):
        assert time.monotonic() < deadline
        time.sleep(0.05)
