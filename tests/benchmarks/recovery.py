"""A rank of a large model is lost: how long until another one serves in its place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.client import Client, RequestError
from tests.benchmarks.cluster import up
from tests.benchmarks.loading import checkpoint
from tests.benchmarks.report import Report

REST_SECONDS = 10.0
"""Before each kill: ranks are lost from clusters that have run for a while, and not twice at once."""


def recovery(*, kills: int = 5) -> Report:
    """``again_seconds``: from kill -9 of the last of two ranks until a Forward is answered, the median and the longest.
    ``planning_seconds`` is what the first load took to plan: every replacement whose plan no peer gave it does that.
    """
    report = Report("recovery, 2 ranks", "python -m tests.benchmarks recovery")
    for layers, hidden in ((3, 3072), (32, 512)):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, "llama")
            total = checkpoint(folder, layers, hidden)
            row = _replaced(folder, Path(root, "log"), kills)
            report.add(model=f"Llama, {layers} layers", mib=total / 2**20, **row)
    return report


def _replaced(folder: Path, log: Path, kills: int) -> dict[str, Any]:
    again: list[float] = []
    with up(2, model_root=str(folder.parent), deadline=60, log=log) as target, Client(target, timeout=90) as client:
        client.load("llama", str(folder), verify=False)
        for _ in range(kills):
            time.sleep(REST_SECONDS)
            again.append(_kill(client))
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"load_finished"' in line]
    loads = [line for line in lines if line["logger"] == "shardd"]
    assert len(loads) == 2 + kills, f"{len(loads)} loads"
    return {
        "planning_seconds": max(line["seconds"] - line["reading_seconds"] for line in loads[:2]),
        "again_seconds": statistics.median(again),
        "longest_seconds": max(again),
        "planned_by_a_peer": sum(line["planned_by"] == "a peer" for line in loads),
    }


def _kill(client: Client) -> float:
    """Seconds until what was asked of the last rank is answered by another one."""
    inputs = {"input_ids": np.arange(12, dtype=np.int64)[None]}
    client.forward("llama", inputs)
    os.kill(client.health()["ranks"][-1]["pid"], signal.SIGKILL)
    start = time.perf_counter()
    while time.perf_counter() < start + 60:
        with contextlib.suppress(RequestError):
            client.forward("llama", inputs)
            return time.perf_counter() - start
        time.sleep(0.02)
    raise RuntimeError("no answer in 60 s")
