"""What ``ps`` shows of this process, for one that was not started by its own command line, and of its threads."""

from __future__ import annotations

import ctypes
from pathlib import Path

PR_SET_NAME = 15
_NAME_BYTES = 15


def set_title(*words: str) -> None:
    """Write ``words`` over this process's command line, as far as they fit; nothing happens where that cannot be."""
    name_thread(words[0])
    try:
        # "pid (name) state ...": the 48th and 49th fields are where the arguments begin and end in memory.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
    except (OSError, IndexError, ValueError):
        return
    room = end - start
    if room <= 1 or not start:
        return
    text = b"\0".join(word.encode(errors="replace") for word in words)[: room - 1]
    ctypes.memmove(start, text.ljust(room, b"\0"), room)


def name_thread(name: str) -> None:
    """Name the calling thread for ``ps -L`` and ``top -H``; Python itself names none before 3.14."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:_NAME_BYTES], 0, 0, 0)
