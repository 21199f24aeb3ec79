"""What a service manager and `ps` are told: over a real notification socket, of a real process."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    """The manager's end of the socket."""
    name = f"{tmp_path}/notify" if request.param == "path" else f"@tensor-parallel-test-{os.getpid()}"
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind("\0" + name[1:] if name.startswith("@") else name)
    receiver.settimeout(20)
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    yield receiver
    receiver.close()


def test_several_lines_are_one_message(manager):
    systemd.notify("READY=1", "STATUS=2 ranks")
    assert manager.recv(100) == b"READY=1\nSTATUS=2 ranks"


async def _feed(manager, messages):
    task = asyncio.create_task(systemd.ready())
    heard = [await asyncio.to_thread(manager.recv, 100) for _ in range(messages)]
    task.cancel()
    return heard


@pytest.mark.parametrize("of_this_process", [True, False])
def test_the_watchdog_is_fed_for_as_long_as_the_loop_turns(manager, monkeypatch, of_this_process):
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if of_this_process else "1")
    if of_this_process:
        assert asyncio.run(_feed(manager, 4)) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]
    else:
        asyncio.run(systemd.ready())  # returns: there is nobody to feed
        assert manager.recv(100) == b"READY=1"


def test_nobody_is_told_where_there_is_no_manager(monkeypatch, tmp_path):
    for where in ("", "relative", f"{tmp_path}/nobody"):
        monkeypatch.setenv("NOTIFY_SOCKET", where)
        systemd.notify("READY=1")


def test_a_process_shows_the_words_it_was_given():
    code = (
        "import sys; from pathlib import Path; from shardd.title import set_title\n"
        "set_title('shardd', '--rank', '3', 'x' * 10000)\n"
        "print(Path('/proc/self/comm').read_text().strip(), Path('/proc/self/cmdline').read_bytes())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, *["room"] * 20], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert shown.startswith("shardd b'shardd\\x00--rank\\x003\\x00xxx")
    assert "room" not in shown
    assert Path("/proc/self/comm").read_text() != "shardd\n"
