"""``aten.linear`` on this CPU: as torch runs it, and with the weight as the first factor."""

from __future__ import annotations

import statistics
import time

import torch

from tensor_parallel.planner.cpu_linear import MOST, linear, linear_features_first
from tests.benchmarks.report import Report

SHAPES = ((8192, 4096), (2048, 1024), (1024, 1024), (512, 512))
ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
SECONDS = 0.4


def linears() -> Report:
    """One call in microseconds, the median of turns; ``over_torch`` below 1 is faster.

    Where the rows are too few or too many, or the weight is small, both run the same kernel.
    """
    report = Report("linear", "python -m tests.benchmarks linear")
    before = torch.get_num_threads()
    try:
        for threads in sorted(MOST):
            torch.set_num_threads(threads)
            for features, width in SHAPES:
                weight, bias = torch.randn(features, width), torch.randn(features)
                for rows in ROWS:
                    _compare(report, threads, torch.randn(rows, width), weight, bias)
    finally:
        torch.set_num_threads(before)
    return report


def _compare(report: Report, threads: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    calls = {
        "torch_us": torch.nn.functional.linear,
        "linear_us": linear,
        "features_first_us": linear_features_first,
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(taken["torch_us"]) < 5:
            for name, call in calls.items():
                start = time.perf_counter()
                call(x, weight, bias)
                taken[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) * 1e6 for name, times in taken.items()}
    shape = f"{weight.shape[1]} to {weight.shape[0]}"
    report.add(
        threads=threads, layer=shape, rows=x.shape[0], **medians, over_torch=medians["linear_us"] / medians["torch_us"]
    )
