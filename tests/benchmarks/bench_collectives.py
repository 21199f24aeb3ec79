"""Collectives over shared memory against gloo, on this machine.

    python -m tests.benchmarks.bench_collectives [--ranks 2] [--json FILE] [--dtype float32]

Each backend and size is measured in the same processes, alternating, one thread per rank. A time is the median over
calls of rank 0's wall time. Nothing here passes or fails: the table and the JSON say what was measured, and on what.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tensor_parallel.backends.shm_library import load_library
from tensor_parallel.group import Backend
from tests.multiprocess.ranks import Place, Ranks

SIZES = (1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 10 << 20, 64 << 20)
SECONDS_PER_POINT = 0.4
TARGETS = {16 << 10: 10.0, 256 << 10: 5.0, 10 << 20: 3.0}


def operations(size: int, dtype: torch.dtype, world_size: int) -> dict[str, Callable[[Backend], object]]:
    """Every collective moving a tensor of ``size`` bytes in all."""
    count = size // dtype.itemsize
    whole = torch.zeros(count, dtype=dtype)
    sizes = [len(part) for part in torch.arange(count).tensor_split(world_size)]

    def all_gather(backend: Backend) -> object:
        return backend.all_gather(whole[: sizes[backend.rank]], sizes, 0)

    return {
        "all_reduce": lambda backend: backend.all_reduce_sum_(whole),
        "all_gather": all_gather,
        "reduce_scatter": lambda backend: backend.reduce_scatter_sum(whole, sizes, 0),
        "broadcast": lambda backend: backend.broadcast_(whole, 0),
    }


def seconds_of(place: Place, backend: Backend, operation: Callable[[Backend], object]) -> dict[str, float]:
    """Median and 99th percentile. Rank 0 decides how often, so that all ranks do the same."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        operation(backend)
        times.append(time.perf_counter() - start)
    calls = torch.tensor([min(2000.0, max(8.0, SECONDS_PER_POINT / statistics.median(times)))])
    repeats = int(backend.broadcast_(calls, 0).item())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        operation(backend)
        times.append(time.perf_counter() - start)
    times.sort()
    return {"median": statistics.median(times), "p99": times[int(0.99 * (len(times) - 1))], "calls": repeats}


def measure(place: Place, kinds: list[str], dtype_name: str) -> list[dict[str, object]]:
    backends = {kind: place.form(kind, "bench") for kind in kinds}
    rows: list[dict[str, object]] = []
    for size in SIZES:
        for name, operation in operations(size, getattr(torch, dtype_name), place.world_size).items():
            timed = {kind: seconds_of(place, backend, operation) for kind, backend in backends.items()}
            rows.append({"operation": name, "bytes": size, **timed})
    for backend in backends.values():
        backend.close()
    return rows


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show(rows: list[dict[str, object]], kinds: list[str]) -> None:
    print(
        f"{'collective':<16}{'size':>10}" + "".join(f"{kind + ' us':>12}" for kind in kinds) + f"{'ratio':>8}  target"
    )
    for row in rows:
        medians = [row[kind]["median"] * 1e6 for kind in kinds]  # type: ignore[index]
        size = int(row["bytes"])  # type: ignore[call-overload]
        ratio = f"{medians[0] / medians[-1]:.1f}x" if len(kinds) > 1 else ""
        target = f">= {TARGETS[size]:.0f}x" if row["operation"] == "all_reduce" and size in TARGETS else ""
        times = "".join(f"{value:>12.1f}" for value in medians)
        print(f"{row['operation']:<16}{size // 1024:>7} KB{times}{ratio:>8}  {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--json", type=Path, help="also write the results and the machine's facts here")
    arguments = parser.parse_args()
    kinds = ["gloo", *(["shm"] if load_library() is not None else [])]
    facts = machine()
    with Ranks(arguments.ranks) as ranks:
        rows = ranks.run(measure, kinds, arguments.dtype, timeout=500)[0]
    print(f"{arguments.ranks} ranks, one thread each, {arguments.dtype}; {facts}")
    show(rows, kinds)
    if arguments.json:
        report = {"machine": facts, "ranks": arguments.ranks, "dtype": arguments.dtype, "results": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
