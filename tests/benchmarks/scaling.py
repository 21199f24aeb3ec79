"""Efficiency of two ranks over one, in the daemons: unsharded on 1 thread / (2 x two ranks of 1 thread).

Unsharded is what one rank serves: it runs the same kernels as two (see ``linear``), so that the efficiency says how
well the work is divided. ``efficiency_over_torch`` has torch itself instead, in this process on 1 thread: how much
faster two ranks are than the model as it was.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.benchmarks import open_inference
from tests.benchmarks.cluster import up
from tests.benchmarks.models import mlp
from tests.benchmarks.report import Report
from tests.benchmarks.served import FACTORY, engine_seconds, load

CASES = (
    ("MLP 4096-16384", {"width": 4096, "hidden": 16384, "layers": 1}, (64, 512)),
    ("8 x MLP 1024-4096", {"width": 1024, "hidden": 4096, "layers": 8}, (1, 16, 128)),
)


ROUNDS = 7


def scaling(*, seconds: float = 0.3) -> Report:
    """Both clusters are up at once and take turns; a figure is the median over rounds of the mean forward in one."""
    report = Report("scaling, 2 ranks x 1 thread", "python -m tests.benchmarks scaling")
    generator = np.random.default_rng(0)
    allowed = ["--allow-factory", FACTORY]
    with up(1, extra=allowed, threads=1) as alone, up(2, extra=allowed, threads=1) as pair:
        for name, arguments, batches in CASES:
            for target in (alone, pair):
                load(target, "mlp", FACTORY, **arguments)
            torch.set_num_threads(1)
            model, _ = mlp(**arguments)
            for batch in batches:
                x = generator.standard_normal((batch, arguments["width"]), dtype=np.float32)
                rounds = [
                    (_torch_ms(model, x, seconds), _mean_ms(alone, x, seconds), _mean_ms(pair, x, seconds))
                    for _ in range(ROUNDS)
                ]
                ratios = [one / (2 * two) for _, one, two in rounds]
                report.add(
                    model=name,
                    batch=batch,
                    torch_ms=statistics.median(own for own, _, _ in rounds),
                    unsharded_ms=statistics.median(one for _, one, _ in rounds),
                    two_ranks_ms=statistics.median(two for _, _, two in rounds),
                    efficiency=statistics.median(ratios),
                    best_round=max(ratios),
                    efficiency_over_torch=statistics.median(own / (2 * two) for own, _, two in rounds),
                )
    return report


def _mean_ms(target: str, x: np.ndarray, seconds: float) -> float:
    """Of one forward in the daemons."""
    before = engine_seconds(target, "mlp")
    open_inference.latency(target, "mlp", x, repeats=200, seconds=seconds)
    after = engine_seconds(target, "mlp")
    return (after[0] - before[0]) / (after[1] - before[1]) * 1e3


def _torch_ms(model: torch.nn.Module, x: npt.NDArray[Any], seconds: float) -> float:
    """Of one forward in this process."""
    value = torch.from_numpy(x)
    with torch.inference_mode():
        model(value)
        start, count = time.perf_counter(), 0
        while (taken := time.perf_counter() - start) < seconds:
            model(value)
            count += 1
    return taken / count * 1e3
