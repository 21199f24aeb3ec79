"""systemd's notification protocol (sd_notify), as much of it as a service needs. Does nothing outside systemd."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*lines: str) -> None:
    """Tell the service manager, for example ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1`` or ``STATUS=...``."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect("\0" + path[1:] if path.startswith("@") else path)
        sender.send("\n".join(lines).encode())


def watchdog_seconds() -> float | None:
    """Within which time the service manager wants to hear ``WATCHDOG=1``; None if it does not watch this process."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    watched = os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) == 0 or watched not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 1e6
