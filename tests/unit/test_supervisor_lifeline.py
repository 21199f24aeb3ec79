"""The two bare programs that tie processes to the supervisor, each by itself: real processes, pipes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The supervisor runs them by path, with -I -S; coverage sees them only as modules.
EXECUTE, GUARDIAN = (["-m", f"coordinator.supervisor.{name}"] for name in ("execute", "guardian"))
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def execute(parent: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *EXECUTE, str(parent), *command], capture_output=True, text=True, timeout=30, check=False
    )


def test_the_program_takes_the_place_of_its_starter() -> None:
    shown = execute(os.getpid(), sys.executable, "-c", "import os, sys; print(os.getppid(), sys.argv[1:])", "a b", "c")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"{os.getpid()} ['a b', 'c']\n", "")


def test_a_program_that_is_not_there_is_told_as_a_shell_would() -> None:
    shown = execute(os.getpid(), "/no/such/program")
    assert (shown.returncode, shown.stderr) == (127, "/no/such/program: No such file or directory\n")


def test_whose_parent_has_gone_already_never_starts() -> None:
    shown = execute(1, sys.executable, "-c", "print('started')")
    assert (shown.returncode, shown.stdout) == (1, "")


STARTER = """
import os, subprocess, sys, time
program = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
child = subprocess.Popen([sys.executable, *sys.argv[1:], str(os.getpid()), *program], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_the_program_dies_with_its_starter() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *EXECUTE], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    starter.kill()
    starter.wait(10)
    starter.stdout.close()
    _until_gone(child)


class Guarded:
    """A guardian over ``directory``, and a process group for it to watch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "inside").mkdir(parents=True)
        self.guardian = subprocess.Popen([sys.executable, *GUARDIAN, str(directory)], stdin=subprocess.PIPE, text=True)
        self.group = subprocess.Popen(SLEEP, process_group=0)

    def say(self, line: str) -> None:
        assert self.guardian.stdin is not None
        self.guardian.stdin.write(line + "\n")
        self.guardian.stdin.flush()

    def lose(self) -> None:
        """The supervisor ends: so does the pipe."""
        assert self.guardian.stdin is not None
        self.guardian.stdin.close()
        assert self.guardian.wait(20) == 0
        assert not self.directory.exists()

    def close(self) -> None:
        for process in (self.guardian, self.group):
            process.kill()
            process.wait(10)


@pytest.fixture
def guarded(tmp_path: Path):
    made = Guarded(tmp_path / "private")
    yield made
    made.close()


def test_what_lives_when_the_pipe_closes_is_killed(guarded: Guarded) -> None:
    guarded.say("+999999999")  # of a group that has gone meanwhile
    guarded.say(f"+{guarded.group.pid}")
    guarded.lose()
    assert guarded.group.wait(10) == -signal.SIGKILL


def test_what_had_ended_in_order_is_left_alone(guarded: Guarded) -> None:
    """Its number may be another's by now."""
    guarded.say(f"+{guarded.group.pid}")
    guarded.say(f"-{guarded.group.pid}")
    guarded.lose()
    assert guarded.group.poll() is None


def test_the_signals_that_end_the_supervisor_do_not_end_the_guardian(guarded: Guarded) -> None:
    guarded.say(f"+{guarded.group.pid}")
    _until_ignoring(guarded.guardian.pid, signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        guarded.guardian.send_signal(number)
    assert guarded.group.poll() is None
    guarded.lose()
    assert guarded.group.wait(10) == -signal.SIGKILL


def _until_ignoring(pid: int, number: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        ignored = int(next(line for line in lines if line.startswith("SigIgn")).split()[1], 16)
        if ignored >> (number - 1) & 1:
            return
        time.sleep(0.01)
    raise AssertionError("it does not ignore the signal")


def _until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} lives on")
