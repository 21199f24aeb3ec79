"""Efficiency of two ranks over one, in the daemons: unsharded on 1 thread / (2 x two ranks of 1 thread)."""

from __future__ import annotations

import numpy as np

from tests.benchmarks import open_inference
from tests.benchmarks.cluster import up
from tests.benchmarks.report import Report
from tests.benchmarks.served import FACTORY, engine_seconds, load

CASES = (
    ("MLP 4096-16384", {"width": 4096, "hidden": 16384, "layers": 1}, (64, 512)),
    ("8 x MLP 1024-4096", {"width": 1024, "hidden": 4096, "layers": 8}, (1, 16, 128)),
)


def engine_ms(ranks: int, repeats: int) -> dict[tuple[str, int], float]:
    """Mean milliseconds of one forward in the daemons, by case and batch."""
    found: dict[tuple[str, int], float] = {}
    generator = np.random.default_rng(0)
    with up(ranks, extra=["--allow-factory", FACTORY], threads=1) as target:
        for name, arguments, batches in CASES:
            load(target, "mlp", FACTORY, **arguments)
            for batch in batches:
                x = generator.standard_normal((batch, arguments["width"]), dtype=np.float32)
                open_inference.latency(target, "mlp", x, repeats=5)
                before = engine_seconds(target, "mlp")
                open_inference.latency(target, "mlp", x, repeats=repeats, seconds=8)
                after = engine_seconds(target, "mlp")
                found[name, batch] = (after[0] - before[0]) / (after[1] - before[1]) * 1e3
    return found


def scaling(*, repeats: int = 60) -> Report:
    report = Report("scaling, 2 ranks x 1 thread", "python -m tests.benchmarks scaling")
    alone, pair = engine_ms(1, repeats), engine_ms(2, repeats)
    for name, batch in alone:
        one, two = alone[name, batch], pair[name, batch]
        report.add(model=name, batch=batch, unsharded_ms=one, two_ranks_ms=two, efficiency=one / (2 * two))
    return report
