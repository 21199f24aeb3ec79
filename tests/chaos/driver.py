"""Strikes one fault after another at a cluster under load, and reads the figures off the timeline."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from coordinator.client import Client, RequestError
from tests.benchmarks.cluster import up
from tests.chaos.load import Load, Reference
from tests.chaos.models import WIDTH
from tests.chaos.timeline import Fault, Timeline, percentile

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "pause": signal.SIGSTOP}
KINDS = (
    *("rank kill", "rank kill", "rank kill", "rank stop", "rank term", "rank pause", "rank oom"),
    *("coordinator kill", "coordinator kill", "coordinator term"),
)
RECOVERY_DEADLINE = 60.0
MODELS = {"chaos": "tests.chaos.models:deep_mlp", "greedy": "tests.chaos.models:greedy"}
TOO_MUCH = 200  # TiB: more than an address space holds


class NeverRecovered(AssertionError):
    """The service did not answer again in RECOVERY_DEADLINE seconds after a fault."""


@dataclass
class Outcome:
    ranks: int
    timeline: Timeline
    survivors_touched: list[str]

    def figures(self) -> dict[str, Any]:
        """The row that `make chaos` prints; times in seconds."""
        line = self.timeline
        return {
            "scene": f"{self.ranks} ranks",
            **line.counted(),
            "kill_to_notice_p99": percentile(line.notices("rank kill"), 0.99),
            "stop_to_notice_max": percentile(line.notices("rank stop"), 1.0),
            "again_after_rank_kill_p50": percentile(line.again("rank kill"), 0.5),
            "again_after_rank_kill_max": percentile(line.again("rank kill"), 1.0),
            "again_after_rank_term_p50": percentile(line.again("rank term"), 0.5),
            "again_after_rank_stop_p50": percentile(line.again("rank stop"), 0.5),
            "again_after_coordinator_kill_p50": percentile(line.again("coordinator kill"), 0.5),
            "again_after_coordinator_restart_p50": percentile(line.restarted("coordinator kill"), 0.5),
            "survivors_touched": len(self.survivors_touched),
        }


def run(ranks: int, faults: int, *, seed: int = 0, kinds: Sequence[str] = KINDS, log: Path | None = None) -> Outcome:
    """Runs ``faults`` random faults against a fresh cluster of ``ranks`` CPU ranks. Raises NeverRecovered."""
    chance, timeline, reference = random.Random(seed), Timeline(), Reference()
    touched: list[str] = []
    extra = [flag for name, path in MODELS.items() for flag in ("--allow-factory", path, "--load", f"{name}={path}")]
    with tempfile.TemporaryDirectory() as scratch:
        log = log or Path(scratch, "log")
        with up(ranks, extra=extra, log=log) as target, Client(target) as observer, Load(target, reference, timeline):
            wait_serving(observer, ranks)
            for index in range(faults):
                time.sleep(chance.uniform(0.2, 0.8))
                # Each kind in turn first, so that a short run has seen them all.
                kind = kinds[index] if index < len(kinds) else chance.choice(list(kinds))
                touched += strike(kind, chance, observer, ranks, timeline)
        _note_restarts(timeline, log)
    return Outcome(ranks, timeline, touched)


def strike(kind: str, chance: random.Random, observer: Client, ranks: int, timeline: Timeline) -> list[str]:
    """One fault; returns what happened to survivors that should not have (a new pid, another load)."""
    before = wait_serving(observer, ranks)
    who, how = kind.split()
    victim = chance.randrange(ranks) if who == "rank" else None
    pid = before["coordinator"]["pid"] if victim is None else before["ranks"][victim]["pid"]
    fault = Fault(kind, time.monotonic(), who if victim is None else f"rank {victim}", wall=time.time())
    timeline.faults.append(fault)
    gone: int | None = pid
    if how == "oom":
        victim, gone = None, None
        _take_too_much(observer)
    else:
        os.kill(pid, SIGNALS[how])
    if how == "pause":
        gone = None
        time.sleep(chance.uniform(0.2, 1.4))
        os.kill(pid, signal.SIGCONT)
    after = wait_serving(observer, ranks, gone)
    fault.serving_again = time.monotonic() - fault.at
    kept = [(r["rank"], r["pid"], r["loads"]) for r in before["ranks"] if r["rank"] != victim]
    now = {r["rank"]: (r["pid"], r["loads"]) for r in after["ranks"]}
    return [
        f"{kind}: rank {rank} was {(pid, loads)}, is {now[rank]}"
        for rank, pid, loads in kept
        if now[rank] != (pid, loads)
    ]


def _take_too_much(client: Client) -> None:
    """One request that runs one rank out of memory: refused as such, whoever else waits."""
    x = np.zeros((1, WIDTH), np.float32)
    x[0, 0] = TOO_MUCH
    try:
        client.forward("greedy", {"x": x}, timeout=10)
    except RequestError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return
        raise AssertionError(f"out of memory was answered with {error.code().name}: {error}") from None
    raise AssertionError("a request of 200 TiB was answered")


def wait_serving(observer: Client, ranks: int, gone: int | None = None) -> dict[str, Any]:
    """The health of a cluster that serves and of which process ``gone`` is no part. Raises NeverRecovered."""
    end, last = time.monotonic() + RECOVERY_DEADLINE, ""
    while time.monotonic() < end:
        try:
            health = observer.health(timeout=5)
        except RequestError as error:
            last = str(error)
        else:
            pids = {health["coordinator"]["pid"], *(rank["pid"] for rank in health["ranks"])}
            if health["serving"] and len(health["ranks"]) == ranks and gone not in pids:
                return health
            last = health["reason"]
        time.sleep(0.02)
    raise NeverRecovered(f"not serving after {RECOVERY_DEADLINE:.0f} s: {last}")


def _note_restarts(timeline: Timeline, log: Path) -> None:
    """When the supervisor started the replacement, which is in its log alone."""
    starts = []
    for line in log.read_text(errors="replace").splitlines():
        if '"child_started"' in line and '"coordinator"' in line:
            starts.append(datetime.fromisoformat(json.loads(line)["ts"]).timestamp())
    for fault in timeline.faults:
        after = [start for start in starts if start >= fault.wall]
        if fault.kind.startswith("coordinator") and after:
            fault.restarted = min(after) - fault.wall
