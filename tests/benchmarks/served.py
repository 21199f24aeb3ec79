"""The service as clients see it: latency, throughput and large tensors, against floors and, if at hand, Triton."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.client import Client
from tests.benchmarks import open_inference
from tests.benchmarks.cluster import up
from tests.benchmarks.floors import bare_grpc, in_process
from tests.benchmarks.report import Report, median_ms, percentile_ms, timed

WIDTH, HIDDEN = 1024, 4096
FACTORY = "tests.benchmarks.models:mlp"
BIG_ROWS = (16 << 20) // (WIDTH * 4)


def inputs() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    rows = {"batch 1": 1, "batch 64": 64, "16 MiB": BIG_ROWS}
    return {name: generator.standard_normal((count, WIDTH), dtype=np.float32) for name, count in rows.items()}


def load(target: str, name: str, factory: str, **arguments: Any) -> None:
    with Client(target) as client:
        client.load(name, factory, kind="factory", arguments=arguments)


def measure(target: str, model: str, *, repeats: int, seconds: float) -> dict[str, float]:
    """One server's row: p50 milliseconds per case and requests per second of 16 clients."""
    row: dict[str, float] = {}
    for name, x in inputs().items():
        row[f"{name} ms"] = median_ms(
            open_inference.latency(target, model, x, repeats=repeats if x.nbytes < 1 << 20 else 15)
        )
    rate, taken = open_inference.throughput(target, model, inputs()["batch 1"], clients=16, seconds=seconds)
    return row | {"16 clients rps": rate, "16 clients p99 ms": percentile_ms(taken, 0.99)}


def served(triton_venv: Path | None, *, repeats: int = 300, seconds: float = 5.0) -> Report:
    """Linear(1024, 4096) - ReLU - Linear(4096, 1024): ours on 2 ranks, the floors and Triton, in one run."""
    report = Report("served MLP 1024-4096", "python -m tests.benchmarks served")
    for threads in (1, 2):
        report.add(server=f"torch in process, {threads} threads", **_row(in_process(WIDTH, HIDDEN, threads), repeats))
    with bare_grpc(WIDTH, HIDDEN, 2) as call:
        report.add(server="bare grpc.aio, one process", **_row(call, repeats))
    with up(2, extra=["--allow-factory", FACTORY]) as target:
        load(target, "mlp", FACTORY, width=WIDTH, hidden=HIDDEN)
        report.add(server="this service, 2 ranks", **measure(target, "mlp", repeats=repeats, seconds=seconds))
    if triton_venv is not None:
        from tests.benchmarks.triton_server import serving_mlp

        for threads in (1, 2):
            with serving_mlp(triton_venv, width=WIDTH, hidden=HIDDEN, threads=threads) as target:
                row = measure(target, "mlp", repeats=repeats, seconds=seconds)
                report.add(server=f"Triton python backend, {threads} threads", **row)
    _ratios(report)
    return report


def _row(call: Callable[[np.ndarray], np.ndarray], repeats: int) -> dict[str, float]:
    cases = inputs().items()
    return {f"{name} ms": median_ms(timed(lambda x=x: call(x), repeats=repeats, seconds=5)) for name, x in cases}


def _ratios(report: Report) -> None:
    """Ours against Triton's best thread count for each figure (latency: below 1 is faster; rate: above 1 is more)."""
    ours = next(row for row in report.rows if row["server"].startswith("this service"))
    rivals = [row for row in report.rows if row["server"].startswith("Triton")]
    if not rivals:
        return
    row: dict[str, float] = {}
    for key in ("batch 1 ms", "batch 64 ms", "16 MiB ms"):
        row[key] = ours[key] / min(rival[key] for rival in rivals)
    row["16 clients rps"] = ours["16 clients rps"] / max(rival["16 clients rps"] for rival in rivals)
    report.add(server="ratio: ours / Triton's best", **row)


def overhead() -> Report:
    """What the service adds to the engine's own forward at batch 1, one client (p50)."""
    report = Report("overhead over the engine's forward, batch 1", "python -m tests.benchmarks overhead")
    with up(2, extra=["--allow-factory", FACTORY, "--allow-factory", "tests.benchmarks.models:identity"]) as target:
        load(target, "mlp", FACTORY, width=WIDTH, hidden=HIDDEN)
        x = inputs()["batch 1"]
        before = engine_seconds(target, "mlp")
        taken = open_inference.latency(target, "mlp", x, repeats=500)
        after = engine_seconds(target, "mlp")
        engine = (after[0] - before[0]) / (after[1] - before[1]) * 1e3
        report.add(
            case="MLP 1024-4096, 2 ranks",
            served_p50_ms=median_ms(taken),
            engine_mean_ms=engine,
            overhead_ms=median_ms(taken) - engine,
        )
    return report


def engine_seconds(target: str, model: str) -> tuple[float, int]:
    """(seconds inside the ranks' forward, forwards) of ``model`` so far, from the server's statistics."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(target) as client:
        stats = client.get_inference_statistics(model).model_stats[0]
    return stats.inference_stats.compute_infer.ns / 1e9, stats.inference_stats.compute_infer.count
