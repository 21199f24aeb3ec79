"""Starts children, watches them, replaces them, ends them."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.logging import get_logger
from coordinator.supervisor.child import Child, ChildSpec, describe_exit, reap_orphans
from coordinator.supervisor.lifeline import Guardian, become_subreaper
from coordinator.supervisor.probe import Answer, Probe, busy, stopped
from coordinator.supervisor.spare import Spare

USAGE_ERROR = 2


class StartError(Exception):
    """A child said, by exit code 2, that it cannot start as told; or ended again and again; or was not up in time."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. A silent child is killed after two unanswered heartbeats if it is stopped or idle: about 1.7 s after it
    was stopped, and up to 1.75 s later if it hangs otherwise."""

    heartbeat: float = 0.25
    calm: float = 2.0  # between heartbeats of one that is ready: each takes a processor from its work
    answer: float = 0.7
    silent_answers: int = 2
    busy: float = 15.0  # how long one may be silent while it runs
    start: float = 180.0  # until it first answers
    first_pause: float = 0.25  # after a first failed start, then doubled
    longest_pause: float = 30.0
    repeated: int = 3  # failed starts in a row that make an error of a warning
    hopeless: int = 6  # failed starts in a row that end the supervisor's own start


class Supervisor:
    """Keeps the children of ``stages`` running from `start` to `stop`; the last stage is the first to be stopped.

    Run it in the main thread of a process that has no other children: they are killed when the thread that started them
    ends, and every orphan is reaped. ``directory`` is removed at the end, also when this process is killed.
    """

    def __init__(self, stages: Sequence[Sequence[ChildSpec]], directory: Path, timing: Timing | None = None) -> None:
        self._timing = timing or Timing()
        self._guardian = Guardian(directory)
        ranks = [spec for stage in stages for spec in stage if spec.rank_arguments]
        first = ranks[0] if ranks else None
        self._spare = Spare(first.rank_arguments, first.environment, self._guardian) if first is not None else None
        self._stages = [[Child(spec, self._guardian, self._spare) for spec in stage] for stage in stages]
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._helper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._up = False  # every child has answered once
        self._log = get_logger()

    @property
    def children(self) -> list[Child]:
        return [child for stage in self._stages for child in stage]

    async def start(self) -> None:
        """Starts every child and returns when each has answered once. Raises StartError."""
        become_subreaper()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        if self._spare is not None:
            self._helper = asyncio.create_task(self._spare.keep(), name="spare")
        for child in self.children:
            self._tasks[child.spec.name] = asyncio.create_task(self._keep(child), name=child.spec.name)
        up = asyncio.gather(*(child.alive.wait() for child in self.children))
        waiting: list[asyncio.Future[Any]] = [up, *self._tasks.values()]
        done, _ = await asyncio.wait(waiting, timeout=self._timing.start, return_when=asyncio.FIRST_COMPLETED)
        if up in done:
            self._up = True
            return
        up.cancel()
        await asyncio.gather(up, return_exceptions=True)
        for task in done:
            task.result()  # raises what ended it
        missing = ", ".join(child.spec.name for child in self.children if not child.alive.is_set())
        raise StartError(f"not up within {self._timing.start:.0f} s: {missing}", 1)

    async def wait(self) -> None:
        """Returns never; raises what ended the supervision of a child, which is a bug of ours."""
        await asyncio.gather(*self._tasks.values())

    async def stop(self) -> None:
        """Ends the stages, last first, each child within its ``stop_seconds``; then the directory goes."""
        self._stopping.set()
        for child in self.children:
            if child.pid is None:
                self._tasks[child.spec.name].cancel()  # or it would be started just now
        if self._helper is not None:
            self._helper.cancel()
            await asyncio.gather(self._helper, return_exceptions=True)
        for stage in reversed(self._stages):
            await asyncio.gather(*(self._end(child) for child in stage))
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        self._guardian.close()

    def kill(self) -> None:
        """Ends `stop`'s patience: everything is killed now."""
        for child in self.children:
            child.signal(signal.SIGKILL)

    def _reap(self) -> None:
        known = {child.pid for child in self.children if child.pid is not None}
        if self._spare is not None and self._spare.pid is not None:
            known.add(self._spare.pid)
        reap_orphans(known | {self._guardian.pid})

    async def _end(self, child: Child) -> None:
        if child.exited is None or child.pid is None:
            return
        child.signal(signal.SIGTERM)
        done, _ = await asyncio.wait([child.exited], timeout=child.spec.stop_seconds)
        if not done:
            self._log.warning("child_killed", child=child.spec.name, pid=child.pid, reason="did not end in time")
            child.signal(signal.SIGKILL)
            await child.exited

    async def _keep(self, child: Child) -> None:
        while not self._stopping.is_set():
            await child.start()
            assert child.exited is not None
            self._log.info("child_started", child=child.spec.name, pid=child.pid, starts=child.starts)
            pid = child.pid
            watch = asyncio.create_task(self._watch(child))
            try:
                code = await asyncio.shield(child.exited)
            finally:
                watch.cancel()
            if self._stopping.is_set():
                return
            if child.starts == 1 and not child.alive.is_set() and code == USAGE_ERROR:
                raise StartError(f"{child.spec.name} did not start: {describe_exit(code)}", USAGE_ERROR)
            pause = self._after(child, pid, code)
            if not self._up and child.failed_starts >= self._timing.hopeless:
                raise StartError(f"{child.spec.name} ended {child.failed_starts} times: {describe_exit(code)}", 1)
            if pause:
                await _until(self._stopping, pause)

    def _after(self, child: Child, pid: int | None, code: int) -> float:
        """Reports a death, and returns the seconds to wait before the next start."""
        self._reap()
        timing = self._timing
        child.failed_starts = 0 if child.ready else child.failed_starts + 1
        pause = 0.0
        if child.failed_starts:
            pause = min(timing.longest_pause, timing.first_pause * 2.0 ** min(child.failed_starts - 1, 30))
        report = self._log.error if child.failed_starts >= timing.repeated else self._log.warning
        report(
            "child_exited",
            child=child.spec.name,
            pid=pid,
            status=describe_exit(code),
            uptime_seconds=round(child.uptime, 3),
            was_ready=child.ready,
            failed_starts=child.failed_starts,
            restart_in_seconds=pause,
        )
        return pause

    async def _watch(self, child: Child) -> None:
        """Heartbeats until the child is silent for too long, and then kills it; it is replaced as any dead one is."""
        timing, pid = self._timing, child.pid
        assert pid is not None
        silent, silent_since, asked = 0, 0.0, -math.inf
        loop = asyncio.get_running_loop()
        async with Probe(child.spec.health, child.spec.liveness, child.spec.readiness) as probe:
            while True:
                if child.ready and not silent and loop.time() < asked + timing.calm and not stopped(pid):
                    await asyncio.sleep(timing.heartbeat)
                    continue
                asked = loop.time()
                answer = await probe.ask(timing.answer, readiness=not child.ready)
                if answer is not Answer.SILENT:
                    silent = 0
                    child.alive.set()
                    child.ready = child.ready or answer is Answer.READY
                elif child.alive.is_set():
                    silent_since = silent_since if silent else loop.time() - timing.answer
                    silent += 1
                    reason = self._hung(pid, silent, loop.time() - silent_since)
                    if reason:
                        return self._kill(child, reason)
                elif child.uptime > timing.start:
                    return self._kill(child, f"has not answered within {timing.start:.0f} s of its start")
                await asyncio.sleep(timing.heartbeat)

    def _hung(self, pid: int, silent: int, seconds: float) -> str:
        if silent < self._timing.silent_answers:
            return ""
        if not busy(pid):
            return f"silent for {seconds:.1f} s, stopped or idle"
        return f"silent for {seconds:.1f} s although running" if seconds > self._timing.busy else ""

    def _kill(self, child: Child, reason: str) -> None:
        self._log.error("child_unresponsive", child=child.spec.name, pid=child.pid, reason=reason)
        child.signal(signal.SIGKILL)


async def _until(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
