"""Cleans up after a supervisor that was killed: ``python -I -S guardian.py DIRECTORY``, standard input the lifeline.

The supervisor holds the only write end of the pipe, and tells through it which process groups live ("+PID", "-PID").
When the pipe closes, whatever is left of them is killed: the children die of their parent-death signal, but what they
started themselves would not. Then the private directory goes. After an orderly end there is nothing left to do.
"""

import contextlib
import os
import shutil
import signal
import sys


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it ends with the supervisor, not before
    groups: set[int] = set()
    for line in sys.stdin:
        change, group = line[0], int(line[1:])
        groups.add(group) if change == "+" else groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
