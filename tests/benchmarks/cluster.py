"""A whole local cluster for a benchmark: ``shardctl up`` as users start it, stopped at the end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def up(
    ranks: int,
    *,
    extra: Sequence[str] = (),
    threads: int = 1,
    model_root: str | None = None,
    shared_memory: str = "",
    deadline: float = 90.0,
    log: Path | None = None,
) -> Iterator[str]:
    """Yields ``host:port`` of a coordinator over ``ranks`` CPU daemons of ``threads`` threads each.

    Their logs go to ``log``. ``shared_memory``: the prefix of what clients may share.
    Raises RuntimeError with the end of the log when the cluster does not come up in ``deadline`` seconds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = log or Path(scratch, "log")
        command = [
            sys.executable,
            "-m",
            "coordinator.cli",
            "up",
            "--ranks",
            str(ranks),
            "--device",
            "cpu",
            "--port",
            "0",
        ]
        command += ["--model-root", model_root or scratch, *extra]
        environment = os.environ | {"SHARDD_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        if shared_memory:
            environment["COORDINATOR_ENABLE_SHARED_MEMORY"] = shared_memory
        with log.open("wb") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stream)
        try:
            yield _ready_target(process, log, deadline)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready_target(process: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    end = time.monotonic() + deadline
    assert process.stdout is not None
    text = b""
    while time.monotonic() < end and process.poll() is None:
        if select.select([process.stdout], [], [], 0.5)[0]:
            chunk = os.read(process.stdout.fileno(), 65536)
            text += chunk
            for line in text.decode(errors="replace").splitlines():
                if line.startswith("READY target="):
                    return line.split("target=", 1)[1].split()[0]
                if line.startswith("{") and '"target"' in line:
                    with contextlib.suppress(json.JSONDecodeError):
                        return str(json.loads(line)["target"])
            if not chunk:
                break
    raise RuntimeError(f"the cluster did not come up:\n{text.decode()}\n{log.read_text(errors='replace')[-3000:]}")
