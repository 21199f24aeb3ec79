"""A machine with a real systemd for tests: systemd-nspawn over an overlay of this host's root file system.

It has a network of its own and writes nothing outside its overlay. ``run`` is a command in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from tests.deploy.hosts import Relay

BOOT_SECONDS = 40.0
NEEDED = ("systemd-nspawn", "nsenter", "mount", "umount")


def skip_unless_possible() -> None:
    if os.geteuid() != 0:
        pytest.skip("systemd-nspawn needs root")
    missing = [program for program in NEEDED if not shutil.which(program)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: systemd-container)")
    if not Path("/usr/lib/systemd/system/basic.target").exists():
        pytest.skip("no systemd in this file system that could be booted")
    if "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no overlay file system")


class Machine:
    """``prepare`` changes the root file system before the boot; ``bind`` shows directories of ours there, read-only."""

    def __init__(self, directory: Path, prepare: Callable[[Path], None], bind: Mapping[Path, str]) -> None:
        self._directory, self._prepare, self._bind = directory, prepare, bind
        self._stack = contextlib.ExitStack()
        self.root = directory / "root"
        self.pid = 0

    def __enter__(self) -> Machine:
        with contextlib.ExitStack() as stack:
            self._mount(stack)
            self._prepare(self.root)
            self._boot(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _mount(self, stack: contextlib.ExitStack) -> None:
        # The upper layer must not itself lie in the lower one.
        _call("mount", "-t", "tmpfs", "-o", "size=2g,mode=0755", "tmpfs", str(self._directory))
        stack.callback(_call, "umount", "--lazy", str(self._directory))
        upper, work = self._directory / "upper", self._directory / "work"
        for directory in (upper, work, self.root):
            directory.mkdir()
        _call("mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}", str(self.root))
        stack.callback(_call, "umount", "--lazy", str(self.root))

    def _boot(self, stack: contextlib.ExitStack) -> None:
        self.console = self._directory / "console"
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--boot"]
        command += [f"--bind-ro={source}:{place}" for source, place in self._bind.items()]
        command += [
            "--directory",
            str(self.root),
            "--console=pipe",
            "systemd.unit=basic.target",
            "systemd.log_color=no",
        ]
        with self.console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        stack.callback(self._halt)
        deadline = time.monotonic() + BOOT_SECONDS
        while not self._booted():
            if self._nspawn.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"systemd does not boot here: {self.console.read_text(errors='replace')[-500:]}")
            time.sleep(0.1)

    def _booted(self) -> bool:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._nspawn.pid).children(recursive=True):
                if child.name() == "systemd" and self._namespace_pid(child.pid) == "1":
                    self.pid = child.pid
        return bool(self.pid) and self.systemctl("is-active", "basic.target", check=False).strip() == "active"

    @staticmethod
    def _namespace_pid(pid: int) -> str:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(line for line in lines if line.startswith("NSpid:")).split()[-1]

    def _halt(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGRTMIN + 4)  # power off
        try:
            self._nspawn.wait(15)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait(10)

    # ---- in the machine

    def run(self, *command: str, check: bool = True, seconds: float = 40.0) -> str:
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--"]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=seconds, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", "--no-pager", *arguments, check=check)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        lines = self.systemctl("show", unit, *(f"--property={name}" for name in properties)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def main_pid(self, unit: str) -> int:
        """As the machine numbers its processes; 0 if it has none."""
        return int(self.show(unit, "MainPID")["MainPID"])

    def kill(self, pid: int, number: signal.Signals) -> None:
        self.run("kill", f"-{number.value}", str(pid))

    def journal(self, *arguments: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", *arguments)

    def reach(self, port: int) -> Relay:
        relay = Relay(Path(f"/proc/{self.pid}/ns/net"), ("127.0.0.1", port))
        self._stack.callback(relay.close)
        return relay


def _call(*command: str) -> None:
    subprocess.run(command, capture_output=True, timeout=30, check=True)
