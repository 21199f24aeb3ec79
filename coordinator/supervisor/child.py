"""One supervised process: what to start, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.supervisor.lifeline import Guardian, spawn
from coordinator.supervisor.spare import Process, Spare
from coordinator.supervisor.tee import Tee


@dataclass(frozen=True)
class ChildSpec:
    """``argv`` is asked anew at each start, so that a restart can differ (the port that the kernel chose is kept).

    ``health`` is where ``grpc.health.v1`` answers in plaintext; ``readiness`` its service that is SERVING once the
    child does its work. ``stop_seconds`` bounds an orderly end; ``log_file`` gets a copy of what the child says.
    """

    name: str
    argv: Callable[[], list[str]]
    health: str
    liveness: str = "liveness"
    readiness: str = "readiness"
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    stop_seconds: float = 35.0
    log_file: Path | None = None
    rank_arguments: Sequence[str] = ()
    """For a rank that may be made of a spare: its arguments to ``shardd``."""


class Child:
    """The running process of a spec, or the last one."""

    def __init__(self, spec: ChildSpec, guardian: Guardian, spare: Spare | None = None) -> None:
        self.spec = spec
        self.alive = asyncio.Event()  # this incarnation has answered
        self.ready = False  # this incarnation has done its work once
        self.starts = 0
        self.failed_starts = 0  # in a row, without one that became ready
        self.exited: asyncio.Future[int] | None = None
        self._guardian = guardian
        self._spare = spare if spec.rank_arguments else None
        self._process: Process | None = None
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def uptime(self) -> float:
        return time.monotonic() - self._started

    async def start(self) -> None:
        """Starts a new process; call from the main thread's event loop. Raises OSError."""
        loop = asyncio.get_running_loop()
        self.alive.clear()
        self.ready = False
        self.starts += 1
        self._started = time.monotonic()
        self.exited = loop.create_future()
        tee = Tee(self.spec.log_file) if self.spec.log_file is not None else None
        try:
            self._process = await self._make(tee.sink if tee else sys.stderr.fileno())
        finally:
            if tee is not None:
                tee.started()
        self._started = time.monotonic()
        pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(pidfd, self._collect, pidfd, self._process, self.exited)

    async def _make(self, output: int) -> Process:
        """Of the spare, if there is one; else from nothing."""
        if self._spare is not None:
            if self.starts == 1:
                await self._spare.settled()
            forked = await self._spare.fork(self.spec.rank_arguments, self.spec.environment, output)
            if forked is not None:
                return forked
        process = spawn(self.spec.argv(), self.spec.environment, output)
        self._guardian.watch(process.pid)
        return process

    def signal(self, number: signal.Signals) -> None:
        """To the whole group: what the child has started goes with it."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _collect(self, pidfd: int, process: Process, exited: asyncio.Future[int]) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        # Before it is reaped: until then nobody else can be given its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._guardian.forget(process.pid)
        code = process.wait()
        if not exited.done():
            exited.set_result(code)


def describe_exit(code: int) -> str:
    """``exit code 3`` or ``SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def reap_orphans(known: set[int]) -> None:
    """Reaps what was left to us by dead children and is no child of our own making (a pod's first process, too)."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in known:
            return  # ours are collected by their own watchers, which run next
        with contextlib.suppress(ChildProcessError):
            os.waitpid(found.si_pid, os.WNOHANG)
