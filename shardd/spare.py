"""``python -m shardd.spare``: a process that has imported everything, of which ranks are made in milliseconds.

Importing torch and what plans a model takes seconds, and is nearly all the time that a lost rank is missed. So a
supervisor keeps one process that has done it, and asks it to fork. A request comes over standard input, a Unix socket:
two descriptors, one that leads to whoever asked, one for what the new process says. Over the first the new process
tells its pid, and is then told its arguments and its environment; from there on it is a daemon like any other.

The new process is the supervisor's own child, as if that had started it: it is forked twice, and the kernel gives
orphans to the nearest ancestor that asked for them. It dies with the supervisor by the same parent-death signal.

Forking is safe because this process has one thread, and has touched no GPU; both are looked at before every fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from shardd import environment
from shardd.config import ConfigError, read_config
from shardd.title import set_title

READY, UNFIT = b"+", b"-"
"""Said over standard input: ready to fork; and: not fit to be forked any more, start ranks without me."""
ADOPTION_SECONDS = 5.0
IDLE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Until the supervisor closes the socket, or is gone. ``arguments`` are any rank's of this node."""
    try:
        config = read_config(arguments, os.environ)
    except ConfigError:
        return 2  # a rank started with these says what is wrong
    supervisor = os.getppid()
    set_title("shardd: spare")
    environment.prepare(os.environ, threads=config.threads, world_size=config.world_size, interface=config.interface)
    _import()
    with socket.socket(fileno=0) as control:
        if not fit():
            control.sendall(UNFIT)
            return 1
        control.sendall(READY)
        for request in _requests(control):
            if not fit():
                control.sendall(UNFIT)
                return 1
            _fork(request, supervisor)
    return 0


def _import() -> None:
    """Everything that a daemon and its first load need. What lives now is never looked at again by the collector."""
    gc.disable()
    from shardd import core, reading  # noqa: F401
    from shardd.daemon import Daemon  # noqa: F401

    reading.warm_up()
    gc.collect()
    gc.freeze()
    gc.enable()


def _import_more() -> None:
    """What only some models need. Forks cannot be had meanwhile, so it waits for a quiet moment, the first of which is
    when the ranks have been made; and it does not take the processor from those who serve."""

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        with contextlib.suppress(ImportError):
            import transformers.modeling_utils
            import transformers.models.auto  # noqa: F401

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    deadline = time.monotonic() + 1.0
    while threads() > 1 and time.monotonic() < deadline:
        time.sleep(0.001)  # joined, and yet on its way out of the kernel
    gc.collect()
    gc.freeze()


def fit() -> bool:
    """Whether a fork of this process is as good as a new one."""
    opened = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return threads() == 1 and not any(path.startswith("/dev/nvidia") for path in opened)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _requests(control: socket.socket) -> Iterator[list[int]]:
    """Until there is no more supervisor. Those of the first ranks come at once; when none comes for a while, more is
    imported."""
    quiet = False
    while True:
        if not quiet and not select.select([control], [], [], IDLE_SECONDS)[0]:
            quiet = True
            _import_more()
        request = _receive(control)
        if request is None:
            return
        yield request


def _receive(control: socket.socket) -> list[int] | None:
    """The two descriptors of the next request; None when there is no more supervisor."""
    data, descriptors, _, _ = socket.recv_fds(control, 1, 2)
    return descriptors if data and len(descriptors) == 2 else None


def _fork(descriptors: list[int], supervisor: int) -> None:
    between = os.fork()
    if between == 0:
        _fork_again(descriptors, supervisor)
    os.waitpid(between, 0)
    for descriptor in descriptors:
        os.close(descriptor)


def _fork_again(descriptors: list[int], supervisor: int) -> None:
    """The daemon's parent for a moment: its end makes the daemon an orphan, and so the supervisor's child."""
    own, made = os.getpid(), -1
    try:
        made = os.fork()
    finally:
        if made != 0:
            os._exit(0)
    _become(descriptors, own, supervisor)


def _become(descriptors: list[int], between: int, supervisor: int) -> NoReturn:
    """The rest of this process's life is a daemon's."""
    os.setpgid(0, 0)
    deadline = time.monotonic() + ADOPTION_SECONDS
    while os.getppid() == between and time.monotonic() < deadline:
        time.sleep(0.0005)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)
    arguments = _hear(*descriptors)
    sys.argv[:] = ["shardd", *arguments]
    set_title(*sys.argv)
    from shardd.main import main as serve

    sys.exit(serve(arguments))


def _hear(asker: int, output: int) -> list[str]:
    """Takes over the output and the environment that the asker sends, and returns the arguments."""
    told = b""
    with socket.socket(fileno=asker) as channel, contextlib.suppress(OSError):
        channel.sendall(f"{os.getpid()}\n".encode())
        told = b"".join(iter(lambda: channel.recv(1 << 16), b""))
    if not told:
        os._exit(1)  # whoever asked no longer wants it
    nothing = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    message = json.loads(told)
    os.environ.clear()
    os.environ.update(message["environment"])
    return list(message["arguments"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
