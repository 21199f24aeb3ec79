"""Who this daemon is: a process on a host. Torch-free."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """Facts that do not change while the process lives. ``incarnation`` is new for every process."""

    rank: int
    world_size: int
    pid: int = field(default_factory=os.getpid)
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    host_id: str = field(default_factory=lambda: host_id())


def host_id() -> str:
    """Equal for processes that share a kernel, a /dev/shm and a user, and so can share memory; else different.

    Containers of one host have the same boot id, but a /dev/shm of their own unless told otherwise.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        shared = os.stat("/dev/shm")
    except OSError:
        return uuid.uuid4().hex
    facts = f"{boot} {shared.st_dev} {shared.st_ino} {os.getuid()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
