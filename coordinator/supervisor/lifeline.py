"""What ties processes to this one, so that they end with it even if it is killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_HERE = Path(__file__).parent
# Neither the user's site directory nor the environment reaches these two; they need only the standard library.
_BARE = (sys.executable, "-I", "-S")
PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Orphans of dead children come to this process instead of init, so that it sees and reaps them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bound(argv: Sequence[str]) -> list[str]:
    """``argv`` as a command whose process is killed when the *thread* that starts it ends; see execute.py."""
    return [*_BARE, str(_HERE / "execute.py"), str(os.getpid()), *argv]


def spawn(argv: Sequence[str], environment: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    """Starts ``argv`` in a process group of its own; it is killed when the calling *thread* ends, so call from main.

    Standard output and error both go to ``output``: what a child says is a log.
    """
    return subprocess.Popen(
        bound(argv),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        process_group=0,  # Ctrl-C at the terminal reaches the supervisor alone, which then drains in order
    )


class Guardian:
    """The process that outlives us for a moment to clean up; see guardian.py."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [*_BARE, str(_HERE / "guardian.py"), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, group: int) -> None:
        self._say(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._say(f"-{group}\n")

    def close(self) -> None:
        """Ends it; the directory is gone afterwards."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(10)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed it; the parent-death signal still holds
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
