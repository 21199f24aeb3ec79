"""``python -m tests.chaos``: faults under load, too much load, many generations and hostile messages; one table of
figures. Exits 1 on a broken promise.

``python -m tests.chaos fuzz --strikes 10000``: hostile messages to every RPC.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Report
from tests.chaos import endurance, fuzzing, network, overload
from tests.chaos.driver import run
from tests.chaos.timeline import Timeline

# Never more than this, on any machine.
BOUNDS: dict[str, float] = {
    "wrong": 0,
    "past_deadline": 0,
    "other": 0,
    "retrying_failed": 0,
    "health_lies": 0,
    "survivors_touched": 0,
}
# The same, of the scenes that strike no faults.
LIMITS: dict[str, float] = {
    "internal": 0,
    "died": 0,
    "grown_mib": 48.0,
    "threads_grown": 2,
    "descriptors_grown": 4,
    "generations_grown_mib": 10.0,
    "loads": 1,
}
# Seconds, and ratios of seconds: promised for a machine that has the cores for its ranks and clients.
TIMES = {
    "kill_to_notice_p99": 0.25,
    "stop_to_notice_max": 2.0,
    "again_after_rank_kill_p50": 2.5,
    "again_after_coordinator_restart_p50": 1.0,
    "accepted_p50_over_normal": 3.0,
    "accepted_p99_over_normal": 3.0,
    "refused_p99": 0.25,
}


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["fuzz"]:
        return fuzzing.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--ranks", default="2,4", help="cluster sizes, by comma")
    parser.add_argument("--faults", type=int, default=200, help="faults in total, a quarter of them of the network")
    parser.add_argument("--overload", type=float, default=30.0, help="seconds at ten times the rate; 0: not at all")
    parser.add_argument("--generations", type=int, default=200, help="in one pair of daemons; 0: not at all")
    parser.add_argument("--strikes", type=int, default=10_000, help="hostile messages to every RPC; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the processes' logs in this file")
    args = parser.parse_args(arguments)
    report = Report("chaos", f"python -m tests.chaos --ranks {args.ranks} --faults {args.faults} --seed {args.seed}")
    broken: list[str] = []

    def add(figures: dict[str, Any], timeline: Timeline | None = None) -> None:
        notes = figures.pop("notes", [])
        report.add(**figures)
        for key, bound in (BOUNDS | LIMITS | TIMES).items():
            if (figures.get(key) or 0) > bound:
                broken.append(f"{figures['scene']}: {key} = {figures[key]}, promised {bound}")
        if timeline is not None:
            bad = [a for a in timeline.answers if a.outcome not in ("ok", "UNAVAILABLE")]
            notes += timeline.lies()[:5] + [f"{a.outcome}: {a.detail}" for a in bad][:5]
        report.notes += notes

    sizes = [int(size) for size in args.ranks.split(",")]
    share = -(-args.faults // len(sizes))
    of_network = share // 4
    for size in sizes:
        outcome = run(size, share - of_network, seed=args.seed + size, log=args.log)
        add(outcome.figures() | {"notes": outcome.survivors_touched[:5]}, outcome.timeline)
        if of_network:
            add(*network.run(size, of_network, args.seed + size))
    if args.overload:
        add(overload.run(args.overload))
    if args.generations:
        with tempfile.TemporaryDirectory() as scratch:
            add(endurance.run(Path(scratch), args.generations))
    if args.strikes:
        for row, siege in fuzzing.figures(args.strikes, args.seed):
            add(row | {"notes": siege.bad[:5]})
    print(report.transposed())
    for line in broken:
        print(f"BROKEN PROMISE: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
