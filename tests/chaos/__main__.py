"""``python -m tests.chaos``: faults under load, one table of figures; exits 1 on a broken promise."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks.report import Report
from tests.chaos.driver import run

BOUNDS = {"wrong": 0, "past_deadline": 0, "other": 0, "retrying_failed": 0, "health_lies": 0, "survivors_touched": 0}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--ranks", default="2,4", help="cluster sizes, by comma")
    parser.add_argument("--faults", type=int, default=200, help="faults in total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the processes' logs in this file")
    args = parser.parse_args()
    sizes = [int(size) for size in args.ranks.split(",")]
    report = Report("chaos", f"python -m tests.chaos --ranks {args.ranks} --faults {args.faults} --seed {args.seed}")
    broken = []
    for size in sizes:
        outcome = run(size, -(-args.faults // len(sizes)), seed=args.seed + size, log=args.log)
        figures = outcome.figures()
        report.add(**figures)
        broken += [f"{size} ranks: {key} = {figures[key]}" for key, bound in BOUNDS.items() if figures[key] > bound]
        report.notes += [*outcome.survivors_touched[:5], *outcome.timeline.lies()[:5]]
        report.notes += [
            f"{a.outcome}: {a.detail}" for a in outcome.timeline.answers if a.outcome not in ("ok", "UNAVAILABLE")
        ][:5]
    print(report.transposed())
    for line in broken:
        print(f"BROKEN PROMISE: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
