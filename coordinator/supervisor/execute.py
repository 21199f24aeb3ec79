"""Becomes the program given, bound to the parent's life: ``python -I -S execute.py PARENT_PID PROGRAM ARGUMENT...``

The kernel's parent-death signal has to be asked for by the child itself, between fork and exec. Python's own hook for
that spot (``preexec_fn``) runs the interpreter in a fork of a threaded process, where any lock may be held for ever; so
the child is this file first, 10 ms long, and then the program, which keeps the setting and the pid.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program, *arguments = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):  # died before the line above
        sys.exit(1)
    try:
        os.execvp(program, [program, *arguments])
    except OSError as error:
        print(f"{program}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
