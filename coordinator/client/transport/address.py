"""Where a server listens: what of gRPC's targets is reached without grpcio, and how."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import unavailable
from coordinator.client.transport.sockets import Sockets
from coordinator.http2.peers import keep_socket_alive

_HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")  # as in dns:name, which has no port
_RESOLVE_SLICE = 0.05  # seconds after which a look-up sees that the client was closed
_CROWDED_PAUSE = 0.005  # seconds; a Unix socket whose backlog is full tells nobody when it is not

Place = tuple[int, Any]  # address family, and the address as ``connect`` takes it


@dataclass(frozen=True, slots=True)
class Address:
    """``path`` of a Unix socket, or else ``host`` and ``port``. ``authority`` is the server's name in requests."""

    target: str
    authority: str
    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def of(cls, target: str) -> Address | None:
        """HOST:PORT, [IPV6]:PORT, unix:PATH and unix:///PATH; None for all else."""
        if target.startswith("unix:"):
            path = target.removeprefix("unix:")
            if path.startswith("//"):  # a URI, with an authority that has to be empty
                path = path.removeprefix("//")
                if not path.startswith("/"):
                    return None
            return None if not path or "%" in path or "?" in path else cls(target, "localhost", path=path)
        match = _HOST_AND_PORT.fullmatch(target)
        if match is None or match[2] in _SCHEMES or not 0 < int(match[3]) < 1 << 16:
            return None
        return cls(target, target, host=match[1] or match[2], port=int(match[3]))

    def places(self, deadline: Deadline, sockets: Sockets) -> list[Place]:
        """What the name stands for, in the system's order. Raises CallFailed."""
        if self.path:
            return [(socket.AF_UNIX, self.path)]
        with contextlib.suppress(ValueError):
            version = ipaddress.ip_address(self.host).version
            return [(socket.AF_INET if version == 4 else socket.AF_INET6, (self.host, self.port))]
        found: list[Place] = []
        failed: list[str] = []

        def look_up() -> None:
            try:
                answers = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
                found.extend(dict.fromkeys((family, place) for family, _, _, _, place in answers))
            except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
                failed.append(str(error))

        # The system's look-up knows no deadline, so it gets a thread to be left behind in.
        thread = threading.Thread(target=look_up, name=f"look up {self.host}", daemon=True)
        thread.start()
        while thread.is_alive() and not sockets.closed:
            thread.join(deadline.part(_RESOLVE_SLICE, 1).remaining())
        if failed:
            raise unavailable(f"DNS resolution failed for {self.target}: {failed[0]}")
        return found

    def name_of(self, place: Place) -> str:
        """``place`` for messages."""
        return self.target if self.path or place[1][0] == self.host else f"{self.target} ({place[1][0]})"


def connect(made: socket.socket, place: Any, deadline: Deadline, sockets: Sockets) -> None:
    """Raises OSError, or CallFailed when the deadline has passed."""
    while (code := made.connect_ex(place)) == errno.EAGAIN and not sockets.closed:
        deadline.remaining()
        time.sleep(_CROWDED_PAUSE)
    if code == errno.EINPROGRESS and not sockets.closed:
        done = select.poll()
        done.register(made, select.POLLOUT)
        while not done.poll(deadline.milliseconds()):
            pass
        code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code or sockets.closed:
        raise OSError(code, os.strerror(code))
    if made.family != socket.AF_UNIX:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_socket_alive(made)
