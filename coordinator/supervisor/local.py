"""A cluster of one's own for as long as a ``with`` block lasts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

from coordinator.supervisor.lifeline import bound


class LocalClusterError(RuntimeError):
    """``shardctl up`` ended before it was ready; ``code`` is its exit code, and its messages went to its stderr."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class LocalCluster:
    """Runs ``shardctl up`` with ``arguments``, on a port of the kernel's choice; ends with the block or this process.

    >>> with LocalCluster("--ranks", "2", "--model-root", "models") as cluster:  # doctest: +SKIP
    ...     Client(cluster.target).load("m", "m")

    ``stderr`` gets the logs of every process (default: ours). Start it from the main thread.
    """

    def __init__(
        self,
        *arguments: str,
        stderr: IO[bytes] | int | None = None,
        environment: Mapping[str, str] | None = None,
        stop_seconds: float = 45.0,
    ) -> None:
        command: Sequence[str] = (sys.executable, "-m", "coordinator.cli", "up", "--json", "--port", "0", *arguments)
        self._stop_seconds = stop_seconds
        self.process = subprocess.Popen(
            bound(command),
            env=dict(os.environ if environment is None else environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            process_group=0,
        )
        self.ready: dict[str, Any] = {}

    @property
    def target(self) -> str:
        return str(self.ready["target"])

    def wait(self) -> Self:
        """Returns once it serves. Raises LocalClusterError if it ends instead; `up` bounds the time itself."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line.strip() else {}
        if not found.get("ready"):
            code = self.process.wait(self._stop_seconds)
            self.process.stdout.close()
            raise LocalClusterError(found.get("error", f"shardctl up ended with exit code {code}"), code)
        self.ready = found
        return self

    def close(self) -> int:
        """Drains, and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(self._stop_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def __enter__(self) -> Self:
        try:
            return self.wait()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
