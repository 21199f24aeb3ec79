"""Real ``shardd`` processes for tests: started, awaited, killed by pid, their logs collected.

    with Daemons(2, tmp_path, model_root=models) as daemons:
        daemons[0].address            # "unix:/..." or "127.0.0.1:..."
        daemons[1].kill()             # SIGKILL, and reaped
        daemons.restart(1)            # a new process at the same address
        daemons[0].events("forward")  # log lines as dicts

They listen on Unix sockets in ``directory`` unless ``tcp=True`` (then on 127.0.0.1, on a port of the kernel's choice).
They die with the test process, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0
STOP_SECONDS = 15.0
MEASURED = any(name in os.environ for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"))

# Ask the kernel to kill this process with its parent, then become the daemon.
_LAUNCH = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class StartFailed(AssertionError):
    """The daemon did not start to listen; the message has its log."""


def wait_for(condition, what: str, seconds: float = START_SECONDS, every: float = 0.01):
    """Poll ``condition`` until it is truthy and return it; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(every)
    return value


def _state(thread: Path) -> str:
    """One letter: proc(5); none of a thread that has ended meanwhile."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class DaemonProcess:
    """One ``shardd``, running until it is stopped, killed or dies."""

    def __init__(
        self, arguments: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, module: str = "shardd"
    ) -> None:
        self.arguments = list(arguments)
        self.log_path = log
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SHARDD_")}
        environment.update(env or {})
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, "-m", module, *self.arguments],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def suspend(self) -> None:
        """SIGSTOP. Its threads stop one after another, and one of them could still take a command; so it waits."""
        self.process.send_signal(signal.SIGSTOP)
        wait_for(lambda: set(map(_state, Path(f"/proc/{self.pid}/task").iterdir())) == {"T"}, "every thread to stop")

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self.alive:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP_SECONDS)
        self._log.close()

    def close(self, told: bool = False) -> None:
        """The end of a test. Where coverage is measured the process has to end by itself, in a hurry, to tell its own;
        ``told``: it knows already."""
        if not told:
            self.hurry()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0 if MEASURED else 0.0)
        self.kill()

    def hurry(self) -> None:
        for _ in range(2 if MEASURED and self.alive else 0):
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status, once there is one."""
        return self.process.wait(seconds)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def events(self, name: str | None = None) -> list[dict]:
        """Log lines as dicts; those of event ``name`` only, if given."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if name is None or line.get("event") == name]


class Shardd(DaemonProcess):
    """A daemon that was told to write a port file; :meth:`await_address` waits until it listens."""

    def __init__(self, arguments: Sequence[str], *, port_file: Path, log: Path, **options) -> None:
        port_file.unlink(missing_ok=True)
        super().__init__([*arguments, "--port-file", str(port_file)], log=log, **options)
        self.port_file = port_file
        self.address = ""

    def await_address(self) -> str:
        """Where it listens. Raises StartFailed with the log if it died instead."""
        deadline = time.monotonic() + START_SECONDS
        while not self.port_file.exists():
            if not self.alive or time.monotonic() > deadline:
                raise StartFailed(f"shardd did not start (exit {self.process.poll()}):\n{self.log()}")
            time.sleep(0.01)
        self.address = self.port_file.read_text().strip()
        return self.address


class Daemons:
    """``count`` daemons, one per rank."""

    def __init__(
        self,
        count: int,
        directory: Path,
        *,
        model_root: Path | None = None,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        tcp: bool = False,
        device: str = "cpu",
        module: str = "shardd",
    ) -> None:
        self.count = count
        self.directory = directory
        self._arguments = list(arguments)
        self._root = model_root or directory
        self._env = env
        self._tcp = tcp
        self._device = device
        self._module = module
        self._ports: dict[int, str] = {}
        self.members: list[Shardd] = []

    def __enter__(self) -> Daemons:
        try:
            self.members = [self._start(rank) for rank in range(self.count)]
            for rank, member in enumerate(self.members):
                self._ports[rank] = member.await_address()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            member.hurry()
        for member in self.members:
            member.close(told=True)

    def __getitem__(self, rank: int) -> Shardd:
        return self.members[rank]

    def __iter__(self) -> Iterator[Shardd]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def addresses(self) -> list[str]:
        return [member.address for member in self.members]

    def restart(self, rank: int, module: str = "") -> Shardd:
        """Kill the daemon of ``rank`` if it lives, and start another at the same address."""
        self.members[rank].kill()
        self.members[rank] = self._start(rank, module)
        self.members[rank].await_address()
        return self.members[rank]

    def _start(self, rank: int, module: str = "") -> Shardd:
        listen = self._ports.get(rank) or ("127.0.0.1:0" if self._tcp else f"unix:{self.directory}/rank{rank}.sock")
        arguments = ["--rank", str(rank), "--world-size", str(self.count), "--listen", listen]
        arguments += ["--device", self._device, "--model-root", str(self._root), "--log-format", "json"]
        return Shardd(
            [*arguments, *self._arguments],
            port_file=self.directory / f"rank{rank}.port",
            log=self.directory / f"rank{rank}.log",
            env=self._env,
            module=module or self._module,
        )
