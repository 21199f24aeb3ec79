"""CPU ranks over TCP, with the one thing torch's gloo lacks: a way out of a blocked collective."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import ProcessGroupGloo, Store

from tensor_parallel.backends.rendezvous import is_timeout, wait_for_keys
from tensor_parallel.backends.torch_group import TorchGroupBackend
from tensor_parallel.errors import CollectiveTimeout, PeerLost


class GlooBackend(TorchGroupBackend):
    """A gloo process group whose blocked collectives end at once on :meth:`abort`.

    ``ProcessGroupGloo.abort`` does not free a blocked operation (torch 2.13); shutting down its TCP connections does,
    here and on every peer. So the backend keeps a duplicate of each connection's descriptor, which nobody else can
    close and reuse.

    Args:
        store: rendezvous, prefixed so that no other generation uses the same keys.
        timeout: bound of forming the group and of each collective.
        host: address to bind, when the host's own name does not resolve to one its peers can reach.

    Raises:
        CollectiveTimeout: a peer did not come in time.
        PeerLost: a peer came and went.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: timedelta, host: str = "") -> None:
        before = _open_sockets()
        try:
            process_group = ProcessGroupGloo(store, rank, world_size, _options(timeout, host))
        except RuntimeError as error:
            detail = str(error).partition("\n")[0]
            kind = CollectiveTimeout if is_timeout(detail) else PeerLost
            raise kind(f"rank {rank} of {world_size} could not form a gloo group: {detail}") from error
        super().__init__(process_group, rank, world_size, "gloo")
        opened = [fd for fd, inode in _open_sockets().items() if before.get(fd) != inode]
        self._connections = _mesh_connections(opened, store, rank, world_size, timeout)

    def close(self) -> None:
        super().close()
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    def _cut(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the peer may have closed it first
                connection.shutdown(socket.SHUT_RDWR)


def _options(timeout: timedelta, host: str) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._threads = 2
    options._devices = [
        ProcessGroupGloo.create_device(hostname=host) if host else ProcessGroupGloo.create_default_device()
    ]
    return options


def _open_sockets() -> dict[int, str]:
    """Descriptor to inode of every socket this process has open."""
    sockets = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                sockets[int(name)] = target
    return sockets


def _mesh_connections(
    opened: list[int], store: Store, rank: int, world_size: int, timeout: timedelta
) -> list[socket.socket]:
    """Duplicates of this group's connections among the sockets ``opened`` while it was formed.

    Other threads open sockets too. A connection is the group's when one of its ends is the port that a member listens
    on.
    """
    ours: list[socket.socket] = []
    ports: list[int] = []
    for fd in opened:
        with contextlib.suppress(OSError):
            candidate = socket.socket(fileno=os.dup(fd))
            if candidate.family not in (socket.AF_INET, socket.AF_INET6):
                candidate.close()
            elif candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                ports.append(candidate.getsockname()[1])
                candidate.close()
            else:
                ours.append(candidate)
    store.set(f"listening/{rank}", ",".join(map(str, ports)))
    names = [f"listening/{peer}" for peer in range(world_size)]
    wait_for_keys(store, names, timeout)
    members = {int(port) for name in names for port in store.get(name).decode().split(",") if port}
    return [connection for connection in ours if _joins(connection, members)]


def _joins(connection: socket.socket, ports: set[int]) -> bool:
    with contextlib.suppress(OSError):
        if connection.getsockname()[1] in ports or connection.getpeername()[1] in ports:
            return True
    connection.close()
    return False
