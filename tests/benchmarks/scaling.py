"""Efficiency of two ranks over one, in the daemons: unsharded on 1 thread / (2 x two ranks of 1 thread)."""

from __future__ import annotations

import statistics

import numpy as np

from tests.benchmarks import open_inference
from tests.benchmarks.cluster import up
from tests.benchmarks.report import Report
from tests.benchmarks.served import FACTORY, engine_seconds, load

CASES = (
    ("MLP 4096-16384", {"width": 4096, "hidden": 16384, "layers": 1}, (64, 512)),
    ("8 x MLP 1024-4096", {"width": 1024, "hidden": 4096, "layers": 8}, (1, 16, 128)),
)


ROUNDS = 5


def scaling(*, seconds: float = 1.0) -> Report:
    """Both clusters are up at once and take turns; a figure is the median over rounds of the mean forward in one."""
    report = Report("scaling, 2 ranks x 1 thread", "python -m tests.benchmarks scaling")
    generator = np.random.default_rng(0)
    allowed = ["--allow-factory", FACTORY]
    with up(1, extra=allowed, threads=1) as alone, up(2, extra=allowed, threads=1) as pair:
        for name, arguments, batches in CASES:
            for target in (alone, pair):
                load(target, "mlp", FACTORY, **arguments)
            for batch in batches:
                x = generator.standard_normal((batch, arguments["width"]), dtype=np.float32)
                rounds = [(_mean_ms(alone, x, seconds), _mean_ms(pair, x, seconds)) for _ in range(ROUNDS)]
                ratios = [one / (2 * two) for one, two in rounds]
                report.add(
                    model=name,
                    batch=batch,
                    unsharded_ms=statistics.median(one for one, _ in rounds),
                    two_ranks_ms=statistics.median(two for _, two in rounds),
                    efficiency=statistics.median(ratios),
                    best_round=max(ratios),
                )
    return report


def _mean_ms(target: str, x: np.ndarray, seconds: float) -> float:
    """Of one forward in the daemons."""
    before = engine_seconds(target, "mlp")
    open_inference.latency(target, "mlp", x, repeats=200, seconds=seconds)
    after = engine_seconds(target, "mlp")
    return (after[0] - before[0]) / (after[1] - before[1]) * 1e3
