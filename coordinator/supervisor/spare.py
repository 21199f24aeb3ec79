"""The supervisor's side of a spare: a process that has imported all that a rank needs, and is asked to fork.

A rank made so answers after tens of milliseconds instead of seconds. It costs one process's memory, of which every rank
made of it shares what it does not write to. Where it cannot be had, ranks are started the usual way: nothing but time
depends on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from coordinator.logging import get_logger
from coordinator.supervisor.lifeline import Guardian, bound

READY = b"+"
PREPARE_SECONDS = 60.0
ANSWER_SECONDS = 2.0  # until the new process has told its pid: forking takes milliseconds
RESTART_SECONDS = 5.0  # between two starts of the spare


class Process(Protocol):
    """What is asked of a running child, however it was started."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def wait(self) -> int: ...


class Forked:
    """A child of ours that the spare has forked; like a Popen as far as it is used."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:
                self.returncode = -signal.SIGKILL  # reaped before it was known
        return self.returncode


class Spare:
    """One spare process, started by `keep` and replaced if it dies. ``arguments`` are those of any rank made of it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], guardian: Guardian) -> None:
        self._argv = [sys.executable, "-m", "shardd.spare", *arguments]
        self._environment = environment
        self._guardian = guardian
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._settled = asyncio.Event()  # it is ready, or is not going to be
        self._ready = False
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def keep(self) -> None:
        """Runs until cancelled. A spare that says it is unfit is not started again."""
        log = get_logger()
        try:
            while True:
                started = time.monotonic()
                self._start()
                self._ready = await self._heard_ready()
                self._settled.set()
                if self._ready:
                    log.info("spare_ready", pid=self.pid, seconds=round(time.monotonic() - started, 3))
                code = await self._ended()
                log.warning("spare_ended", status=code, was_ready=self._ready)
                if not self._ready or code in (0, 1, 2):
                    return  # a new one would end likewise
                self._ready = False
                await asyncio.sleep(max(0.0, started + RESTART_SECONDS - time.monotonic()))
        finally:
            self._ready = False
            self._settled.set()
            self.close()

    async def settled(self) -> None:
        """Until it is known whether there is one, PREPARE_SECONDS at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), PREPARE_SECONDS)

    async def fork(self, arguments: Sequence[str], environment: Mapping[str, str], output: int) -> Forked | None:
        """A new process that runs ``shardd`` with ``arguments``; None if the spare cannot make one now."""
        async with self._turn:
            if not self._ready or self._control is None:
                return None
            here, there = socket.socketpair()
            pid = 0
            with here:
                try:
                    with there:
                        socket.send_fds(self._control, [b"f"], [there.fileno(), output])
                    here.setblocking(False)
                    pid = await asyncio.wait_for(_read_pid(here), ANSWER_SECONDS)
                    self._guardian.watch(pid)
                    message = json.dumps({"arguments": list(arguments), "environment": dict(environment)})
                    await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(here, message.encode()), 1.0)
                except (OSError, ValueError, TimeoutError) as error:
                    get_logger().warning("spare_failed", error=str(error) or type(error).__name__)
                    if pid:
                        self._guardian.forget(pid)  # it ends by itself, having been told nothing
                    return None
            return Forked(pid)

    def close(self) -> None:
        """Ends it."""
        self._ready = False
        if self._control is not None:
            self._control.close()
            self._control = None
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._guardian.forget(process.pid)
            process.wait()

    def _start(self) -> None:
        self.close()
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                bound(self._argv),
                env=dict(self._environment),
                stdin=theirs.fileno(),
                stdout=sys.stderr.fileno(),
                stderr=sys.stderr.fileno(),
                process_group=0,
            )
        self._guardian.watch(self._process.pid)

    async def _heard_ready(self) -> bool:
        assert self._control is not None
        try:
            answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._control, 1), PREPARE_SECONDS)
        except (OSError, TimeoutError):
            return False
        return answer == READY

    async def _ended(self) -> int:
        """Its exit code, once it has ended. One that is not ready by now is ended."""
        process = self._process
        assert process is not None
        if not self._ready:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        descriptor = os.pidfd_open(process.pid)
        loop.add_reader(descriptor, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return process.wait()


async def _read_pid(here: socket.socket) -> int:
    line = b""
    while not line.endswith(b"\n"):
        data = await asyncio.get_running_loop().sock_recv(here, 32)
        if not data:
            raise ValueError("the spare made no process")
        line += data
    return int(line)
