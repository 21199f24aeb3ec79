"""How the ranks of one host come to share memory that has no name, so that nothing can be left behind.

Rank 0 makes an anonymous file (``memfd``) and, per rank, a pipe: that rank's lifeline, whose write end only it will
hold, so that everybody sees it hang up when the rank dies, however it dies. It hands the descriptors to its peers over
a Unix socket in the abstract namespace, whose name and password they find in the store. No step creates an entry in any
file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import Store

from tensor_parallel.backends.rendezvous import wait_for_keys
from tensor_parallel.errors import CollectiveTimeout, PeerLost

_SEALS = 0x0002 | 0x0004 | 0x0001  # F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL: nobody can cut the mapping short
_F_ADD_SEALS = 1033
_HELLO = struct.Struct("<I16s")


@dataclass(frozen=True)
class Host:
    """What ranks must have in common to share memory, and the cores that each may use."""

    identity: str
    cores: tuple[int, ...]

    @classmethod
    def here(cls, flavour: str = "") -> Host:
        """This process's: same boot of the same kernel, same network namespace (abstract sockets), same user.

        ``flavour`` is whatever else must be the same, such as the layout of the memory.
        """
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = os.stat("/proc/self/ns/net").st_ino
        return cls(f"{boot}/{network}/{os.geteuid()}/{flavour}", tuple(sorted(os.sched_getaffinity(0))))

    @classmethod
    def nowhere(cls) -> Host:
        """For a process that cannot share memory: equal to no other."""
        return cls(f"alone/{secrets.token_hex(8)}", ())


def exchange_hosts(store: Store, mine: Host, rank: int, world_size: int, timeout: timedelta) -> list[Host]:
    """Every rank's host, in rank order."""
    store.set(f"host/{rank}", json.dumps([mine.identity, mine.cores]))
    names = [f"host/{peer}" for peer in range(world_size)]
    wait_for_keys(store, names, timeout)
    return [Host(identity, tuple(cores)) for identity, cores in (json.loads(store.get(name)) for name in names)]


@dataclass
class Shared:
    """The descriptors of one rank: the memory, the lifelines it watches (its own included), and the one it holds."""

    memory: int
    watched: list[int]
    held: int

    def close(self) -> None:
        for fd in (self.memory, *self.watched, self.held):
            os.close(fd)


def share(store: Store, size: int, rank: int, world_size: int, timeout: timedelta, prefix: str) -> Shared:
    """Make (rank 0) or receive (the others) ``size`` bytes of zeroed shared memory and the lifelines.

    Raises :class:`CollectiveTimeout` or :class:`PeerLost` when a rank does not come.
    """
    try:
        if rank == 0:
            return _give(store, size, world_size, timeout, prefix)
        return _take(store, rank, world_size, timeout)
    except TimeoutError as error:
        raise CollectiveTimeout(
            f"rank {rank} of {world_size}: a peer did not come to share memory in {timeout}"
        ) from error
    except OSError as error:
        raise PeerLost(f"rank {rank} of {world_size}: a peer left while memory was being shared: {error}") from error


def _give(store: Store, size: int, world_size: int, timeout: timedelta, prefix: str) -> Shared:
    deadline = time.monotonic() + timeout.total_seconds()
    name = f"{prefix or 'tensor-parallel'}-{secrets.token_hex(8)}"
    token = secrets.token_bytes(16)
    with contextlib.ExitStack() as undo, _socket() as listener:
        memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        undo.callback(os.close, memory)
        os.fchmod(memory, 0o600)
        os.ftruncate(memory, size)
        fcntl.fcntl(memory, _F_ADD_SEALS, _SEALS)
        pipes = []
        for _ in range(world_size):
            pipes.append(os.pipe2(os.O_CLOEXEC))
            for fd in pipes[-1]:
                undo.callback(os.close, fd)
        watched = [read for read, _ in pipes]
        listener.bind("\0" + name)
        listener.listen(world_size)
        store.set("shm", json.dumps([name, token.hex()]))
        waiting = set(range(1, world_size))
        while waiting:
            listener.settimeout(_left(deadline))
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_left(deadline))
                peer = _authenticate(connection, token)
                if peer in waiting:
                    socket.send_fds(connection, [b"\0"], [memory, pipes[peer][1], *watched])
                    waiting.remove(peer)
        undo.pop_all()
    for _, write in pipes[1:]:
        os.close(write)
    return Shared(memory, watched, pipes[0][1])


def _take(store: Store, rank: int, world_size: int, timeout: timedelta) -> Shared:
    deadline = time.monotonic() + timeout.total_seconds()
    wait_for_keys(store, ["shm"], timeout)
    name, token = json.loads(store.get("shm"))
    with _socket() as connection:
        connection.settimeout(_left(deadline))
        connection.connect("\0" + name)
        connection.send(_HELLO.pack(rank, bytes.fromhex(token)))
        _, fds, _, _ = socket.recv_fds(connection, 1, 2 + world_size, socket.MSG_CMSG_CLOEXEC)
    if len(fds) != 2 + world_size:
        for fd in fds:
            os.close(fd)
        raise ConnectionResetError(f"got {len(fds)} descriptors of {2 + world_size}")
    memory, held, *watched = fds
    return Shared(memory, watched, held)


def _authenticate(connection: socket.socket, token: bytes) -> int:
    """The rank that speaks, or -1 for a stranger. Anybody on the host can connect to an abstract socket."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid():
        return -1
    try:
        message = connection.recv(_HELLO.size)
        rank, password = _HELLO.unpack(message)
    except (OSError, struct.error):
        return -1
    return int(rank) if secrets.compare_digest(password, token) else -1


@contextlib.contextmanager
def _socket() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as one:
        yield one


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
