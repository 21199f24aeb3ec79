"""The service as clients see it: latency, throughput and large tensors, against floors and, if at hand, Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.client import Client
from tests.benchmarks import open_inference
from tests.benchmarks.cluster import up
from tests.benchmarks.floors import bare_grpc, elementwise, in_process
from tests.benchmarks.report import Report, median_ms, timed

WIDTH, HIDDEN = 1024, 4096
FACTORY, IDENTITY = "tests.benchmarks.models:mlp", "tests.benchmarks.models:identity"
OURS = "this service, 2 ranks"
PREFIX = "benchmark-"
BIG_ROWS = (16 << 20) // (WIDTH * 4)


def inputs() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    rows = {"batch 1": 1, "batch 64": 64, "16 MiB": BIG_ROWS}
    return {name: generator.standard_normal((count, WIDTH), dtype=np.float32) for name, count in rows.items()}


def load(target: str, name: str, factory: str, **arguments: Any) -> None:
    with Client(target) as client:
        client.load(name, factory, kind="factory", arguments=arguments)


Call = Callable[[], object]


def served(triton_venv: Path | None, *, rounds: int = 6, calls: int = 30, seconds: float = 1.5) -> Report:
    """Linear(1024, 4096) - ReLU - Linear(4096, 1024): ours on 2 ranks, the floors and Triton, taking turns.

    ``16 MiB`` is that model with 4096 rows, which is arithmetic above all; ``16 MiB identity`` is ``x + 0``, which is
    transport. Each figure is the median of all calls, in rounds in which every server gets its turn.
    """
    report = Report("served MLP 1024-4096", "python -m tests.benchmarks served --triton VENV")
    with contextlib.ExitStack() as stack:
        floors, servers = _contenders(stack, triton_venv)
        cases = {**{name: _cases(call) for name, call in floors.items()}}
        cases |= {name: _remote_cases(stack, target) for name, target in servers.items()}
        ours = servers[OURS]
        cases[f"{OURS}, client shared memory"] = _shared_cases(stack, ours)
        rows: dict[str, dict[str, float]] = {name: {} for name in cases}
        for case in ("batch 1", "batch 64", "16 MiB", "16 MiB identity"):
            chosen = {name: calls_of[case] for name, calls_of in cases.items() if case in calls_of}
            count = max(2, calls // 10) if case.startswith("16") else calls
            for name, taken in _in_turns(chosen, rounds if case != "16 MiB" else 1, count).items():
                rows[name][f"{case} ms"] = median_ms(taken)
            print(f"  {case}: " + ", ".join(f"{name} {rows[name][f'{case} ms']:.3g} ms" for name in chosen), flush=True)
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(3):
            for name, target in servers.items():
                x = inputs()["batch 1"]
                rates[name].append(open_inference.throughput(target, "mlp", x, clients=16, seconds=seconds)[0])
        for name, found in rates.items():
            rows[name]["16 clients rps"] = sorted(found)[1]
    for name, row in rows.items():
        report.add(server=name, **row)
    _ratios(report)
    return report


def _contenders(
    stack: contextlib.ExitStack, triton_venv: Path | None
) -> tuple[dict[str, dict[str, Callable[[np.ndarray], object]]], dict[str, str]]:
    """What runs in this process or bare, by case; and the servers' addresses. All are up at once."""
    floors = {
        "torch in process, 2 threads": {"mlp": in_process(WIDTH, HIDDEN, 2), "identity": elementwise(2)},
        "bare grpc.aio, one process": stack.enter_context(bare_grpc(WIDTH, HIDDEN, 2)),
    }
    allowed = ["--allow-factory", FACTORY, "--allow-factory", IDENTITY]
    servers = {OURS: stack.enter_context(up(2, extra=allowed, shared_memory=PREFIX))}
    load(servers[OURS], "mlp", FACTORY, width=WIDTH, hidden=HIDDEN)
    load(servers[OURS], "identity", IDENTITY, width=WIDTH)
    if triton_venv is not None:
        from tests.benchmarks.triton_server import serving_mlp

        for threads in (1, 2):
            made = serving_mlp(triton_venv, width=WIDTH, hidden=HIDDEN, threads=threads)
            servers[f"Triton python backend, {threads} threads"] = stack.enter_context(made)
    return floors, servers


def _cases(models: Mapping[str, Callable[[np.ndarray], object]]) -> dict[str, Call]:
    mlp = models["mlp"]
    cases: dict[str, Call] = {name: (lambda x=x: mlp(x)) for name, x in inputs().items()}
    if identity := models.get("identity"):
        big = inputs()["16 MiB"]
        cases["16 MiB identity"] = lambda: identity(big)
    return cases


def _remote_cases(stack: contextlib.ExitStack, target: str) -> dict[str, Call]:
    import tritonclient.grpc as triton

    client = stack.enter_context(triton.InferenceServerClient(target))
    cases: dict[str, Call] = {name: open_inference.requester(client, "mlp", x) for name, x in inputs().items()}
    return cases | {"16 MiB identity": open_inference.requester(client, "identity", inputs()["16 MiB"])}


def _shared_cases(stack: contextlib.ExitStack, target: str) -> dict[str, Call]:
    """Inputs and outputs in memory shared with the service, by our own client."""
    client = stack.enter_context(Client(target))
    region = stack.enter_context(client.shared_memory(2 * (16 << 20) + 4096, PREFIX))
    given = inputs()["16 MiB"]
    x, y = region.array(given.shape, np.float32), region.array(given.shape, np.float32)
    x[:] = given
    return {
        "16 MiB": lambda: client.forward("mlp", {"x": x}, into={"output": y}),
        "16 MiB identity": lambda: client.forward("identity", {"x": x}, into={"output": y}),
    }


def _in_turns(calls: Mapping[str, Call], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of each call; every one gets ``count`` calls in each round, so that all meet the same load."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name] += timed(call, repeats=count, warmup=1, seconds=10)
    return taken


def _ratios(report: Report) -> None:
    """Ours against Triton's best thread count for each figure (latency: below 1 is faster; rate: above 1 is more)."""
    rows = {row["server"]: row for row in report.rows}
    ours, shared, local = rows[OURS], rows[f"{OURS}, client shared memory"], rows["torch in process, 2 threads"]
    rivals = [row for name, row in rows.items() if name.startswith("Triton")]
    latencies = [key for key in ours if key.endswith(" ms")]
    if rivals:
        row = {key: ours[key] / min(rival[key] for rival in rivals) for key in latencies}
        row["16 clients rps"] = ours["16 clients rps"] / max(rival["16 clients rps"] for rival in rivals)
        report.add(server="ratio: ours / Triton's best", **row)
    report.add(server="ratio: ours / in process", **{key: ours[key] / local[key] for key in latencies})
    both = [key for key in latencies if key in shared]
    report.add(server="ratio: shared memory / in process", **{key: shared[key] / local[key] for key in both})


def overhead() -> Report:
    """What the service adds to the engine's own forward at batch 1, one client: p50 less the mean inside the model.

    By tritonclient, and by this project's client, taking turns.
    """
    report = Report("overhead over the engine's forward, batch 1", "python -m tests.benchmarks overhead")
    with up(2, extra=["--allow-factory", FACTORY]) as target, Client(target) as client:
        load(target, "mlp", FACTORY, width=WIDTH, hidden=HIDDEN)
        x = inputs()["batch 1"]
        case = "MLP 1024-4096, 2 ranks"
        clients: dict[str, Callable[[], list[float]]] = {
            case: lambda: open_inference.latency(target, "mlp", x, repeats=100),
            f"{case}, coordinator.client": lambda: timed(
                lambda: client.forward("mlp", {"x": x}), repeats=100, warmup=10
            ),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
        for measure in clients.values():
            measure()
        for _ in range(8):
            for name, measure in clients.items():
                before = engine_seconds(target, "mlp")
                taken = measure()
                after = engine_seconds(target, "mlp")
                engine = (after[0] - before[0]) / (after[1] - before[1]) * 1e3
                found[name].append((median_ms(taken), engine))
        for name, pairs in found.items():
            served_ms, engine_ms = sorted(pairs, key=lambda pair: pair[0] - pair[1])[len(pairs) // 2]
            report.add(
                case=name,
                served_p50_ms=served_ms,
                engine_mean_ms=engine_ms,
                overhead_ms=served_ms - engine_ms,
                least_ms=min(served - engine for served, engine in pairs),
            )
    return report


def engine_seconds(target: str, model: str) -> tuple[float, int]:
    """(seconds inside the slowest rank's forward, forwards) of ``model`` so far, from the server's statistics."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(target) as client:
        stats = client.get_inference_statistics(model).model_stats[0]
    return stats.inference_stats.compute_infer.ns / 1e9, stats.inference_stats.compute_infer.count
