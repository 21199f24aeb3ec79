"""Strikes one fault after another at a cluster under load, and reads the figures off the timeline."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.client import Client
from tests.benchmarks.cluster import up
from tests.chaos.load import Load, Reference
from tests.chaos.timeline import Fault, Timeline, percentile

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
KINDS = ("rank kill", "rank kill", "rank kill", "rank stop", "rank term", "coordinator kill", "coordinator term")
RECOVERY_DEADLINE = 60.0


class NeverRecovered(AssertionError):
    """The service did not answer again in RECOVERY_DEADLINE seconds after a fault."""


@dataclass
class Outcome:
    ranks: int
    timeline: Timeline
    survivors_touched: list[str]

    def figures(self) -> dict[str, Any]:
        """The row that `make chaos` prints; times in seconds."""
        line, counts = self.timeline, self.timeline.outcomes()
        recovery = {
            kind: [f.serving_again for f in line.faults if f.kind == kind and f.serving_again is not None]
            for kind in KINDS
        }
        return {
            "ranks": self.ranks,
            "faults": len(line.faults),
            "requests": len(line.answers),
            "ok": counts["ok"],
            "unavailable": counts["UNAVAILABLE"],
            "wrong": counts["wrong"],
            "past_deadline": counts["DEADLINE_EXCEEDED"],
            "other": sum(counts.values())
            - counts["ok"]
            - counts["UNAVAILABLE"]
            - counts["wrong"]
            - counts["DEADLINE_EXCEEDED"],
            "retrying_failed": sum(a.retried and a.outcome != "ok" for a in line.answers),
            "kill_to_notice_p99": percentile(line.notices("rank kill"), 0.99),
            "stop_to_notice_max": percentile(line.notices("rank stop"), 1.0),
            "again_after_rank_kill_p50": percentile(recovery["rank kill"], 0.5),
            "again_after_rank_stop_p50": percentile(recovery["rank stop"], 0.5),
            "again_after_coordinator_kill_p50": percentile(recovery["coordinator kill"], 0.5),
            "health_lies": len(line.lies()),
            "survivors_touched": len(self.survivors_touched),
        }


def run(ranks: int, faults: int, *, seed: int = 0, kinds: Sequence[str] = KINDS, log: Path | None = None) -> Outcome:
    """Runs ``faults`` random faults against a fresh cluster of ``ranks`` CPU ranks. Raises NeverRecovered."""
    chance, timeline, reference, touched = random.Random(seed), Timeline(), Reference(), []
    extra = ["--allow-factory", "tests.chaos.models:deep_mlp", "--load", "chaos=tests.chaos.models:deep_mlp"]
    with up(ranks, extra=extra, log=log) as target, Client(target) as observer, Load(target, reference, timeline):
        _wait_serving(observer, ranks)
        for _ in range(faults):
            time.sleep(chance.uniform(0.2, 0.8))
            touched += strike(chance.choice(list(kinds)), chance, observer, ranks, timeline)
    return Outcome(ranks, timeline, touched)


def strike(kind: str, chance: random.Random, observer: Client, ranks: int, timeline: Timeline) -> list[str]:
    """One fault; returns what happened to survivors that should not have (a new pid, another load)."""
    before = _wait_serving(observer, ranks)
    who, how = kind.split()
    victim = chance.randrange(ranks) if who == "rank" else None
    pid = before["coordinator"]["pid"] if victim is None else before["ranks"][victim]["pid"]
    fault = Fault(kind, time.monotonic(), who if victim is None else f"rank {victim}")
    os.kill(pid, SIGNALS[how])
    timeline.faults.append(fault)
    after = _wait_replaced(observer, ranks, pid)
    fault.serving_again = time.monotonic() - fault.at
    kept = [(r["rank"], r["pid"], r["loads"]) for r in before["ranks"] if r["rank"] != victim]
    now = {r["rank"]: (r["pid"], r["loads"]) for r in after["ranks"]}
    return [
        f"{kind}: rank {rank} was {(pid, loads)}, is {now[rank]}"
        for rank, pid, loads in kept
        if now[rank] != (pid, loads)
    ]


def _wait_serving(observer: Client, ranks: int, gone: int | None = None) -> dict[str, Any]:
    end, last = time.monotonic() + RECOVERY_DEADLINE, ""
    while time.monotonic() < end:
        try:
            health = observer.health()
        except Exception as error:
            last = str(error)
        else:
            pids = {health["coordinator"]["pid"], *(rank["pid"] for rank in health["ranks"])}
            if health["serving"] and len(health["ranks"]) == ranks and gone not in pids:
                return health
            last = health["reason"]
        time.sleep(0.02)
    raise NeverRecovered(f"not serving after {RECOVERY_DEADLINE:.0f} s: {last}")


def _wait_replaced(observer: Client, ranks: int, pid: int) -> dict[str, Any]:
    return _wait_serving(observer, ranks, gone=pid)
