"""Hosts for tests: network namespaces with an interface and an address of their own, on one slow segment.

with Hosts(3, delay=0.02, loss=0.005) as hosts:
    hosts[0].run("shardd", ...)      # a process of that host
    hosts[1].cut(); hosts[1].heal()  # its network cable
    hosts[2].reach(50051)            # "127.0.0.1:PORT" here, forwarded to that port of the host
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import IO

import pytest

CLONE_NEWNET = 0x40000000
NETWORK = "198.18.0"  # for tests between networks: RFC 2544
INTERFACE = "net0"
_libc = ctypes.CDLL(None, use_errno=True)
# Ask the kernel to kill this process with its parent, then become the program.
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


def skip_unless_possible() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not installed")
    name = f"probe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", name], timeout=10, check=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, timeout=10, check=True)


def connect_in(namespace: Path, address: tuple[str, int]) -> socket.socket:
    """A connection made in that network namespace. A socket keeps the namespace that it was made in."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
        try:
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        finally:
            if _libc.setns(home, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns home")
    finally:
        os.close(home)
        os.close(there)
    try:
        made.settimeout(5)
        made.connect(address)
        made.settimeout(None)
        return made
    except OSError:
        made.close()
        raise


def _inside(namespace: str) -> list[str]:
    """Runs what follows in that network namespace, with a /dev/shm of its own as another host has."""
    mount = 'mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"'
    return ["ip", "netns", "exec", namespace, "unshare", "--mount", "sh", "-c", mount, "sh"]


class Relay:
    """A port of this host's loopback that leads to ``address`` in another network namespace."""

    def __init__(self, namespace: Path, address: tuple[str, int]) -> None:
        self._namespace, self._address = namespace, address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, address: tuple[str, int]) -> None:
        """For connections from now on; open ones stay where they are."""
        self._address = address

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = connect_in(self._namespace, self._address)
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Host:
    def __init__(self, name: str, index: int, stack: contextlib.ExitStack) -> None:
        self.name, self.address = name, f"{NETWORK}.{index + 1}"
        self._stack = stack

    def run(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """A process of this host; it dies with the test. Its output goes to ``log``."""
        with log.open("ab") as output:
            return self.popen(sys.executable, "-c", _LAUNCH, *command, output=output)

    def popen(self, *command: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*_inside(self.name), *command], stdout=output, stderr=output)
        self._stack.callback(_end, process)
        return process

    def cut(self) -> None:
        ip("-n", self.name, "link", "set", INTERFACE, "down")

    def heal(self) -> None:
        ip("-n", self.name, "link", "set", INTERFACE, "up")

    def reach(self, port: int) -> str:
        relay = Relay(Path("/run/netns", self.name), (self.address, port))
        self._stack.callback(relay.close)
        return relay.target


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


class Hosts:
    def __init__(self, number: int, *, delay: float = 0.0, loss: float = 0.0) -> None:
        self._number, self._delay, self._loss = number, delay, loss
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> list[Host]:
        try:
            return self._build(self._stack)
        except BaseException:
            self._stack.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _build(self, stack: contextlib.ExitStack) -> list[Host]:
        prefix = f"tp{os.getpid()}"
        segment = f"{prefix}-segment"
        names = [f"{prefix}-{index}" for index in range(self._number)]
        for name in (segment, *names):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        for index, name in enumerate(names):
            ip("-n", name, "link", "add", INTERFACE, "type", "veth", "peer", "name", f"port{index}", "netns", segment)
            ip("-n", name, "address", "add", f"{NETWORK}.{index + 1}/24", "dev", INTERFACE)
            for namespace, link in ((segment, f"port{index}"), (name, "lo")):
                ip("-n", namespace, "link", "set", link, "up")
            self._without_offloads(name)
            ip("-n", name, "link", "set", INTERFACE, "up")
        self._connect(segment, stack)
        return [Host(name, index, stack) for index, name in enumerate(names)]

    def _without_offloads(self, namespace: str) -> None:
        code = f"from tests.deploy.wire import disable_offloads; disable_offloads({INTERFACE!r})"
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", code]
        root = Path(__file__).resolve().parents[2]
        subprocess.run(command, cwd=root, capture_output=True, timeout=20, check=True)

    def _connect(self, segment: str, stack: contextlib.ExitStack) -> None:
        ports = [f"port{index}" for index in range(self._number)]
        script = str(Path(__file__).with_name("wire.py"))
        command = [sys.executable, "-c", _LAUNCH, sys.executable, script, str(self._delay), str(self._loss), *ports]
        wire = subprocess.Popen(["ip", "netns", "exec", segment, *command], stdout=subprocess.PIPE)
        stack.callback(_end, wire)
        assert wire.stdout is not None
        assert wire.stdout.readline() == b"wired\n"
