"""The supervisor with real children, killed, stopped, hung and orphaned for real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PROGRAM = [sys.executable, "-m", "tests.service.supervised", "supervise"]


class Run:
    """A supervising process, its notes and its log."""

    def __init__(self, directory: Path, children: list[str]) -> None:
        self.directory = directory
        self.log_path = directory / "supervisor.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, str(directory), *children], stdout=subprocess.PIPE, stderr=log, text=True
            )

    def up(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def events(self, event: str) -> list[dict]:
        found = []
        for line in self.log_path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [each for each in found if each.get("event") == event]

    def notes(self, kind: str, name: str) -> list[int]:
        path = self.directory / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[2]) for line in lines if line.split()[:2] == [kind, name]]

    def pid(self, name: str, start: int = 1) -> int:
        """Of the ``start``-th incarnation, waited for."""
        return until(lambda: self.notes("start", name)[start - 1 : start] or None)[0]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def until(probe, bound: float = 30.0):
    """The first true value of ``probe``."""
    deadline = time.monotonic() + bound
    while time.monotonic() < deadline:
        if value := probe():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come about in time")


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def alive_again(run: Run, name: str, start: int) -> int:
    """The pid of the ``start``-th incarnation once it has said hello, and so answers."""
    pid = run.pid(name, start)
    until(lambda: len([e for e in run.events("hello") if e["name"] == name]) >= start)
    return pid


@pytest.fixture
def supervised() -> Iterator:
    # Not pytest's directory: a Unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix="sv") as directory:
        runs = []

        def start(*children: str) -> Run:
            runs.append(Run(Path(directory), list(children)))
            return runs[-1]

        yield start
        for run in runs:
            if run.process.poll() is None:
                run.end()
            run.process.stdout.close()


def test_a_killed_child_is_replaced_at_once_and_the_other_is_left_alone(supervised):
    run = supervised("a", "b")
    assert run.up() == "UP"
    first, other = run.pid("a"), run.pid("b")
    until(lambda: ready(run, "a"))
    os.kill(first, signal.SIGKILL)
    second = alive_again(run, "a", 2)
    assert second != first
    (death,) = run.events("child_exited")
    assert (death["child"], death["status"], death["restart_in_seconds"]) == ("a", "SIGKILL", 0)
    assert death["was_ready"]
    assert run.notes("start", "b") == [other]
    assert run.end() == 0
    assert gone(second)
    assert gone(other)


def ready(run: Run, name: str) -> bool:
    """One heartbeat after the child's readiness was set; asked for as the supervisor does."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"unix:{run.directory}/{name}.health") as channel:
        request = health_pb2.HealthCheckRequest(service="readiness")
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    time.sleep(0.5)  # two heartbeats: the supervisor has seen it as well
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_stopped_child_is_killed_and_replaced(supervised):
    run = supervised("a")
    run.up()
    pid = run.pid("a")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: gone(pid))
    alive_again(run, "a", 2)
    (report,) = run.events("child_unresponsive")
    assert report["pid"] == pid
    assert "stopped or idle" in report["reason"]


def test_a_busy_child_gets_more_time_but_not_for_ever(supervised):
    run = supervised("a")
    run.up()
    pid = run.pid("a")
    (run.directory / "a.spin").touch()
    until(lambda: gone(pid))
    (report,) = run.events("child_unresponsive")
    assert "although running" in report["reason"]
    alive_again(run, "a", 2)


def test_a_child_that_never_gets_ready_is_waited_with_and_reported(supervised):
    run = supervised("a=unready")
    run.up()
    for start in range(1, 5):
        os.kill(alive_again(run, "a", start), signal.SIGKILL)
    alive_again(run, "a", 5)
    deaths = run.events("child_exited")
    assert [death["restart_in_seconds"] for death in deaths] == [0.1, 0.2, 0.4, 0.4]
    assert [death["level"] for death in deaths] == ["warning", "warning", "error", "error"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_outlives_the_supervisor(supervised, number):
    run = supervised("a=parent", "b")
    run.up()
    pids = [run.pid("a"), run.pid("b"), until(lambda: run.notes("grandchild", "a"))[0]]
    children = psutil.Process(run.process.pid).children(recursive=True)
    assert {child.pid for child in children} >= set(pids)
    code = run.end(number)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    for child in children:  # the guardian as well
        until(lambda child=child: gone(child.pid))
    until(lambda: not (run.directory / "private").exists())


def test_the_last_stage_is_stopped_first(supervised):
    run = supervised("daemon", "front")
    run.up()
    run.end()
    order = [line.split()[1] for line in (run.directory / "notes").read_text().splitlines() if line.startswith("end")]
    assert order == ["front", "daemon"]


def test_one_that_does_not_end_in_time_is_killed(supervised):
    run = supervised("a=stubborn")
    run.up()
    pid = run.pid("a")
    alive_again(run, "a", 1)
    assert run.end() == 0
    assert gone(pid)
    assert [event["child"] for event in run.events("child_killed")] == ["a"]


def test_a_child_that_refuses_its_settings_ends_the_start(supervised):
    run = supervised("a", "b=exit2")
    assert run.up() == "StartError 2: b did not start: exit code 2"
    assert run.process.wait(20) == 2
    assert all(gone(pid) for pid in run.notes("start", "a"))


def test_a_child_that_crashes_at_the_start_is_tried_again_and_then_given_up(supervised):
    run = supervised("a", "b=crash")
    assert run.up() == "StartError 1: b ended 5 times: exit code 9"
    assert run.process.wait(20) == 1
    assert [event["status"] for event in run.events("child_exited")] == ["exit code 9"] * 5
    assert gone(run.pid("a"))


def test_a_start_can_be_interrupted(supervised):
    run = supervised("a=crash")
    until(lambda: run.events("child_exited"))
    assert run.end() == 0


def test_what_children_say_passes_through_and_goes_to_the_file(supervised):
    run = supervised("a=logged", "b")
    run.up()
    until(lambda: {event["name"] for event in run.events("hello")} == {"a", "b"})
    assert json.loads((run.directory / "a.log").read_text().splitlines()[0]) == {"event": "hello", "name": "a"}


def test_orphans_left_to_the_supervisor_are_reaped(supervised):
    run = supervised("a=parent")
    run.up()
    pid, grandchild = run.pid("a"), until(lambda: run.notes("grandchild", "a"))[0]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(grandchild))  # not even as a zombie
    alive_again(run, "a", 2)
