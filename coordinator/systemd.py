"""systemd's notification protocol (sd_notify), as much of it as a service needs. Does nothing outside systemd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket


def notify(*lines: str) -> None:
    """Tell the service manager, for example ``READY=1`` or ``STOPPING=1``."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect("\0" + path[1:] if path.startswith("@") else path)
        sender.send("\n".join(lines).encode())


async def ready() -> None:
    """Tell that the service is up, then feed its watchdog from the event loop, which so proves that it turns."""
    notify("READY=1")
    seconds = _watchdog_seconds()
    while seconds:
        notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 3)


def _watchdog_seconds() -> float:
    """0 if the service manager does not watch this process."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", "") not in ("", str(os.getpid())):
        return 0.0
    return int(microseconds) / 1e6
