"""``python -m tests.benchmarks [NAME ...]``: each prints a table; --json keeps the figures with the machine's facts."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.report import Report, machine_facts, plot, write_json


def _collectives(_: argparse.Namespace) -> list[Report]:
    """In a process of its own: its ranks fork from a clean parent with one thread each."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch, "collectives.json")
        command = [sys.executable, "-m", "tests.benchmarks.bench_collectives", "--json", str(found)]
        subprocess.run(command, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
        measured = json.loads(found.read_text())
    report = Report("collectives, 2 ranks", "python -m tests.benchmarks collectives")
    for row in measured["results"]:
        medians = {kind: row[kind]["median"] * 1e6 for kind in ("gloo", "shm") if kind in row}
        ratio = medians["gloo"] / medians["shm"] if len(medians) == 2 else None
        times = {f"{kind}_us": value for kind, value in medians.items()}
        report.rows.append({"operation": row["operation"], "kib": row["bytes"] >> 10, **times, "gloo_over_shm": ratio})
    return [report]


def _served(args: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.served import served

    return [served(Path(args.triton) if args.triton else None)]


def _overhead(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.served import overhead

    return [overhead()]


def _scaling(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.scaling import scaling

    return [scaling()]


def _minilm(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.minilm import minilm

    return [minilm()]


def _loading(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.loading import loading

    return [loading()]


def _recovery(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.recovery import recovery

    return [recovery()]


def _linear(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.linear import linears

    return [linears()]


def _compile(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.execution import execution

    return [execution()]


def _planner(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.planner import planner

    return [planner()]


def _planning(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.planning import planning

    return [planning()]


def _scale(_: argparse.Namespace) -> list[Report]:
    from tests.benchmarks.scale import predictions, scale

    return [predictions(), scale()]


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Report]]] = {
    "collectives": _collectives,
    "linear": _linear,
    "scaling": _scaling,
    "overhead": _overhead,
    "served": _served,
    "minilm": _minilm,
    "loading": _loading,
    "recovery": _recovery,
    "planner": _planner,
    "compile": _compile,
    "planning": _planning,
    "scale": _scale,
}
PLOTS: dict[str, dict[str, object]] = {
    "collectives": {
        "x": ["operation", "kib"],
        "ys": ["gloo_us", "shm_us"],
        "ylabel": "us",
        "log": True,
        "only": {"operation": "all_reduce"},
    },
    "linear": {
        "x": ["layer", "rows"],
        "ys": ["torch_us", "linear_us", "features_first_us"],
        "ylabel": "us per call, 1 thread",
        "log": True,
        "only": {"threads": 1, "layer": "1024 to 2048"},
    },
    "scaling": {
        "x": ["model", "batch"],
        "ys": ["torch_ms", "unsharded_ms", "two_ranks_ms"],
        "ylabel": "ms per forward",
        "log": True,
    },
    "served": {"x": ["server"], "ys": ["batch 1 ms", "batch 64 ms", "16 MiB ms"], "ylabel": "p50, ms", "log": True},
    "loading": {"x": ["case"], "ys": ["mib_per_second"], "ylabel": "MiB/s"},
    "planner": {
        "x": ["model"],
        "ys": ["unsharded", "transformers_gloo", "planned_gloo", "planned_shm", "by_hand_shm"],
        "ylabel": "ms per forward",
        "log": True,
    },
    "scale": {"x": ["ranks", "batch"], "ys": ["measured_ms", "predicted_ms"], "ylabel": "ms per forward", "log": True},
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (all by default)")
    parser.add_argument("--json", metavar="FILE", help="write the figures and the machine's facts")
    parser.add_argument("--plots", metavar="DIR", help="draw a chart of each")
    parser.add_argument(
        "--triton", metavar="VENV", help="measure Triton too: a virtual environment with nvidia-pytriton"
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    print(" ".join(f"{key}={value}" for key, value in machine_facts().items()))
    reports: list[Report] = []
    for name in args.names or BENCHMARKS:
        before = os.getloadavg()[0]
        for index, report in enumerate(BENCHMARKS[name](args)):
            reports.append(report)
            report.notes.append(f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after")
            print(report.table(), flush=True)
            if args.plots and name in PLOTS and index == 0:
                plot(report, Path(args.plots, f"{name}.svg"), **PLOTS[name])  # type: ignore[arg-type]
    if args.json:
        write_json(Path(args.json), reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
