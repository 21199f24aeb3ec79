"""A connection below HTTP/2's state: how its first bytes are cut, who is at its other end, and whether it lives."""

from __future__ import annotations

import socket
from typing import Any

from httpunk import _httpunk as h2

_FRAME_HEADER = 9  # bytes, of which the first three are the payload's length
_KEEPALIVE = 60  # seconds of silence after which the kernel asks whether the peer is still there


class OneByOne:
    """Cuts a connection's bytes behind its preface, and behind each frame."""

    def __init__(self) -> None:
        self._left = len(h2.H2_PREFACE)
        self._header = b""

    def cut(self, data: bytes) -> tuple[bytes, bytes]:
        """The first piece, and the rest."""
        if self._left:
            size = min(self._left, len(data))
            self._left -= size
        else:
            size = _FRAME_HEADER - len(self._header)
            self._header += data[:size]
            if len(self._header) == _FRAME_HEADER:
                self._left, self._header = int.from_bytes(self._header[:3], "big"), b""
        return data[:size], data[size:]


def peer_of(transport: Any) -> str:
    """As gRPC writes it."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return "unix:"
    host, port = name[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def keep_alive(transport: Any) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        keep_socket_alive(sock)


def keep_socket_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE)
