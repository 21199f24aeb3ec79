"""What every benchmark prints: a table, and JSON with the facts of the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, kernel and versions; ratios travel between machines, milliseconds do not."""
    facts: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            facts["processor"] = line.split(":", 1)[1].strip()
            break
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    facts["memory_gib"] = round(pages * size / 2**30, 1)
    from importlib import metadata

    for package in ("torch", "grpcio", "numpy", "transformers", "tritonclient"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def timed(function: Callable[[], Any], *, repeats: int, warmup: int = 3, seconds: float = 20.0) -> list[float]:
    """Seconds of each call, sorted; stops early after ``seconds`` once at least three calls were timed."""
    for _ in range(warmup):
        function()
    taken: list[float] = []
    end = time.monotonic() + seconds
    while len(taken) < repeats and (time.monotonic() < end or len(taken) < 3):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return sorted(taken)


def median_ms(taken: Sequence[float]) -> float:
    return statistics.median(taken) * 1e3


def percentile_ms(taken: Sequence[float], share: float) -> float:
    return sorted(taken)[min(len(taken) - 1, int(share * len(taken)))] * 1e3


@dataclass
class Report:
    """The rows of one benchmark, and the command that made them."""

    name: str
    command: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print("  " + "  ".join(f"{key}={_shown(value)}" for key, value in row.items()), flush=True)

    def table(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        cells = [columns, *[[_shown(row.get(column, "")) for column in columns] for row in self.rows]]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"# {self.name}", f"$ {self.command}", *lines, *self.notes])

    def transposed(self) -> str:
        """The table with one line per column: for few rows of many figures."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        width = max(len(column) for column in columns)
        lines = [
            f"{column.ljust(width)}  " + "  ".join(_shown(row.get(column)).rjust(10) for row in self.rows)
            for column in columns
        ]
        return "\n".join([f"# {self.name}", f"$ {self.command}", *lines, *self.notes])

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "command": self.command, "rows": self.rows, "notes": self.notes}


def write_json(path: Path, reports: Sequence[Report]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine_facts(), "reports": [report.as_json() for report in reports]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(
    report: Report,
    path: Path,
    *,
    x: Sequence[str],
    ys: Sequence[str],
    ylabel: str,
    log: bool = False,
    only: Mapping[str, Any] | None = None,
) -> None:
    """One grouped bar chart of ``ys`` over what the rows have in columns ``x``, as SVG or PNG by the suffix.

    ``only``: what the rows that are drawn have in some columns. Rows that are ratios of others, and say so, are left
    to the table.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.name  # the same figures give the same file
    from matplotlib import pyplot as plt

    measured = [row for row in report.rows if not str(row.get(x[0])).startswith("ratio")]
    measured = [row for row in measured if all(row.get(key) == value for key, value in (only or {}).items())]
    rows = [row for row in measured if any(isinstance(row.get(y), int | float) for y in ys)]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(ys)
    for index, y in enumerate(ys):
        places = [i + (index - (len(ys) - 1) / 2) * width for i in range(len(rows))]
        bars = axes.bar(places, [row.get(y) or 0 for row in rows], width, label=y.replace("_", " "))
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(
        range(len(rows)), ["\n".join(textwrap.fill(str(row[c]), 16) for c in x) for row in rows], fontsize=7
    )
    axes.set_ylabel(ylabel)
    axes.set_title(report.name, fontsize=10)
    if log:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
