"""A whole cluster for a test, by `shardctl up`, as a user starts it.

with cluster("--ranks", "2", "--allow-factory", "tests.service.shard_models:mlp", log=path) as running:
    with Client(running.target) as client: ...
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coordinator.supervisor.local import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
FACTORIES = ("tests.service.shard_models:mlp", "tests.service.shard_models:moody", "tests.service.cli_models:echo")


@contextlib.contextmanager
def cluster(
    *arguments: str,
    log: Path,
    ranks: int = 2,
    factories: tuple[str, ...] = FACTORIES,
    variables: Mapping[str, str] | None = None,
) -> Iterator[LocalCluster]:
    """A cluster of CPU ranks whose logs go to ``log``; what is allowed to be loaded are ``factories``."""
    allowed = [flag for factory in factories for flag in ("--allow-factory", factory)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(variables or {})
    with log.open("ab") as stream:
        running = LocalCluster(
            "--ranks", str(ranks), "--device", "cpu", *allowed, *arguments, stderr=stream, environment=environment
        )
        with running:
            yield running


def events(log: Path, name: str) -> list[dict[str, Any]]:
    """The log's entries of one event."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict) and entry.get("event") == name]


def until(probe: Callable[[], Any], what: str, bound: float = 30.0) -> Any:
    """The first true value of ``probe``."""
    deadline = time.monotonic() + bound
    while time.monotonic() < deadline:
        if value := probe():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {bound:.0f} s: {what}")
