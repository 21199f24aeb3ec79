"""Where a daemon listens and how others reach it: parsing, binding checks, interfaces, port files."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h: address of a network interface


class BindError(OSError):
    """An address cannot be listened on; the message is one line for whoever chose it."""


@dataclass(frozen=True)
class Address:
    """``host:port``, or a Unix socket when ``path`` is given."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_unix(self) -> bool:
        return bool(self.path)

    @property
    def is_wildcard(self) -> bool:
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_unspecified
        return False

    def __str__(self) -> str:
        if self.is_unix:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``. Raises ValueError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path or len(os.fsencode(os.path.abspath(path))) > 100:
            raise ValueError("must name a Unix socket by a path of 1 to 100 bytes")
        return Address(path=os.path.abspath(path))
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    valid = colon and host and port.isascii() and port.isdigit() and int(port) < 65536
    if not valid or "/" in host or any(character.isspace() for character in host):
        raise ValueError("must be HOST:PORT or unix:PATH")
    return Address(host, int(port))


def check_free(address: Address) -> None:
    """Raise :class:`BindError` if nothing could listen on ``address``.

    gRPC itself would replace a Unix socket that another server is using, and says little when a port is taken.
    """
    try:
        if address.is_unix:
            _check_unix(address.path)
        else:
            _check_tcp(address)
    except socket.gaierror as error:
        raise BindError(f"cannot listen on {address}: {error.strerror}") from None
    except OSError as error:
        raise BindError(f"cannot listen on {address}: {error.strerror or error}") from None


def _check_tcp(address: Address) -> None:
    family, kind, protocol, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(place)


def _check_unix(path: str) -> None:
    if not Path(path).parent.is_dir():
        raise OSError(f"{Path(path).parent} is not a directory")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(f"{path} exists and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                return  # left by a daemon that died
        raise OSError("address already in use")


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface. Raises :class:`BindError` when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(name[:15])))
        except OSError as error:
            raise BindError(f"network interface {name!r} has no IPv4 address: {error.strerror}") from None
    return socket.inet_ntoa(answer[20:24])


def reachable_host(listen: Address, advertise: str, interface: str) -> str:
    """The address at which peers reach this daemon: as told, else the interface's, else the one it listens on."""
    if advertise:
        return advertise
    if interface:
        return interface_address(interface)
    if listen.is_unix:
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname()) if listen.is_wildcard else listen.host


def listening_socket(host: str) -> socket.socket:
    """A TCP socket listening on ``host``, on a port of the kernel's choice. Raises :class:`BindError`."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.bind(place)
        listener.listen(128)
    except OSError as error:
        raise BindError(f"cannot listen on {host}, the address for the other ranks: {error.strerror}") from None
    return listener


def write_port_file(path: Path, address: str) -> None:
    """Write the whole line at once: whoever waits for the file never reads half an address."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(address + "\n", encoding="utf-8")
    os.replace(partial, path)
