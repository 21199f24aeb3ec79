"""A server of HTTP/2 made of bytes, for clients that must survive whatever a server says."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from coordinator.client import Client, RequestError
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
HEAD = ((":status", "200"), ("content-type", "application/grpc"))
GREETING = struct.pack(">IBI", SETTINGS, 0, 0)
OUTPUT = np.arange(6, dtype=np.float32)
ANSWER = pb.ForwardResponse(
    outputs=[tensor_pb2.Tensor(name="y", dtype="FLOAT32", shape=[6], data=OUTPUT.tobytes())]
).SerializeToString()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def block(*fields: tuple[str, str]) -> bytes:
    """Fields as HPACK literals that no table remembers."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)


def _text(value: str) -> bytes:
    raw = value.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, size = len(raw) - 127, bytearray(b"\x7f")
    while rest >= 128:
        size.append(rest & 127 | 128)
        rest >>= 7
    return bytes(size) + bytes((rest,)) + raw


def head(stream: int, *more: tuple[str, str], flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, block(*HEAD, *more))


def body(stream: int, message: bytes = ANSWER, flags: int = 0, compressed: int = 0) -> bytes:
    return frame(DATA, flags, stream, struct.pack(">BI", compressed, len(message)) + message)


def trailers(stream: int, *fields: tuple[str, str]) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, block(*(fields or (("grpc-status", "0"),))))


def answer(stream: int) -> bytes:
    return head(stream) + body(stream) + trailers(stream)


class Peer:
    """One connection of a client, as the server sees it."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.seen: list[tuple[int, int, int, bytes]] = []

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, size: int) -> bytes:
        """Raises EOFError."""
        found = b""
        while len(found) < size:
            piece = self.socket.recv(size - len(found))
            if not piece:
                raise EOFError
            found += piece
        return found

    def greet(self, greeting: bytes = GREETING) -> None:
        assert self.read(len(PREFACE)) == PREFACE
        self.send(greeting)

    def frame(self) -> tuple[int, int, int, bytes]:
        """Kind, flags, stream and payload of the next frame."""
        first, flags, stream = struct.unpack(">IBI", self.read(9))
        self.seen.append((first & 0xFF, flags, stream, self.read(first >> 8)))
        return self.seen[-1]

    def until(self, kind: int) -> tuple[int, int, int, bytes]:
        while (found := self.frame())[0] != kind:
            pass
        return found

    def request(self) -> int:
        """The stream of the next request, read to its end."""
        while True:
            kind, flags, stream, _ = self.frame()
            if kind in (DATA, HEADERS) and flags & END_STREAM:
                return stream

    def gone(self) -> None:
        """Returns once the client has closed the connection."""
        with contextlib.suppress(OSError):
            while self.socket.recv(1 << 16):
                pass


@contextlib.contextmanager
def raw_server(*scripts: Callable[[Peer], object]) -> Iterator[tuple[str, list[Peer]]]:
    """Its address, and its connections so far. Each runs the next script, the last one as often as needed, and is
    closed when that ends; a script also ends when the client leaves."""
    peers: list[Peer] = []
    threads: list[threading.Thread] = []
    failures: list[BaseException] = []

    def serve(peer: Peer, script: Callable[[Peer], object]) -> None:
        with peer.socket, contextlib.suppress(OSError, EOFError):
            try:
                script(peer)
            except (AssertionError, TypeError, ValueError, struct.error) as error:
                failures.append(error)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listener.accept()
                connected.settimeout(30)
                peers.append(Peer(connected))
                script = scripts[min(len(peers), len(scripts)) - 1]
                threads.append(threading.Thread(target=serve, args=(peers[-1], script)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", peers
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(10)
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)
            assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


def says(*parts: bytes | Callable[[int], bytes], greeting: bytes = GREETING) -> Callable[[Peer], None]:
    """A script that answers one request with ``parts``, each bytes or a function of the stream."""

    def script(peer: Peer) -> None:
        peer.greet(greeting)
        stream = peer.request()
        for part in parts:
            peer.send(part(stream) if callable(part) else part)
        peer.gone()

    return script


def answers(peer: Peer) -> None:
    """A script that answers whatever comes."""
    peer.greet()
    while True:
        peer.send(answer(peer.request()))


def forward(client: Client, timeout: float = 10.0, x: np.ndarray | None = None) -> np.ndarray:
    return client.forward("m", {"x": np.zeros(3) if x is None else x}, timeout=timeout)["y"]


def failure(script: Callable[[Peer], object], timeout: float = 10.0, **settings: object) -> RequestError:
    with raw_server(script) as (target, _), Client(target, **settings) as client:
        with pytest.raises(RequestError) as caught:
            forward(client, timeout)
    return caught.value


def code(number: int) -> bytes:
    return struct.pack(">I", number)
