"""``shardctl bench``: how fast a running cluster answers, as its clients see it."""

from __future__ import annotations

import os
import platform
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.failures import Failure
from coordinator.cli.forward import describe
from coordinator.cli.settings import Settings, option, settings_of, shared
from coordinator.cli.show import console, print_json, size, table

if TYPE_CHECKING:
    from coordinator.cli.tensor_files import Arrays


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


@shared
@click.command(short_help="Measure latency and throughput against a running cluster.")
@click.argument("name")
@option("--clients", type=click.IntRange(min=1), default=1, show_default=True, help="Calls at a time.")
@option("--seconds", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True, help="Measured time.")
@option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="Calls before that, per client.")
@option("--rows", type=click.IntRange(min=1), default=1, show_default=True, help="Extent of the first free dimension.")
@option("--extent", type=click.IntRange(min=1), default=16, show_default=True, help="Extent of other free dimensions.")
@option("--input", "inputs", multiple=True, metavar="NAME=VALUE", help="As for `forward`.  [default: made up]")
@click.pass_context
def bench(context: click.Context, /, name: str, clients: int, seconds: float, **options: Any) -> None:
    """Calls Forward of NAME from several threads, each over a connection of its own, for some seconds.

    Without --input, the inputs that the model declares are filled with zeros.
    """
    from coordinator.cli.inputs import gather

    settings = settings_of(context)
    with settings.client() as client:
        model = describe(client, name)
        made = gather(options["inputs"], (), None, lambda: model)
        arrays = made or make_inputs(model, options["rows"], options["extent"])
        ranks = client.health()["ranks"]
    begin = time.perf_counter()
    result = measure(settings, name, arrays, clients, seconds, options["warmup"])
    report = summarise(result, clients, seconds, {key: list(value.shape) for key, value in arrays.items()})
    report["machine"] = machine(ranks)
    report["wall_seconds"] = round(time.perf_counter() - begin, 3)
    if settings.json:
        print_json({"model": name, "version": model["version"]} | report)
    else:
        show(name, report)
    if result.errors:
        raise Failure("some calls failed: " + ", ".join(f"{count} x {code}" for code, count in result.errors.items()))


def make_inputs(model: dict[str, Any], rows: int, extent: int) -> Arrays:
    """Zeros, or the smallest value allowed; ones for masks, which must let something through."""
    import numpy as np

    from coordinator.client.arrays import numpy_dtype
    from coordinator.dtypes import from_torch_name

    made: Arrays = {}
    for spec in model["inputs"]:
        if not spec["optional"]:
            free = [rows if axis == 0 else extent for axis in range(len(spec["shape"]))]
            shape = [given if given >= 0 else free[axis] for axis, given in enumerate(spec["shape"])]
            fill = 1 if "mask" in spec["name"] else spec["minimum"] or 0
            made[spec["name"]] = np.full(shape, fill, numpy_dtype(from_torch_name(spec["dtype"])))
    if not made:
        raise Failure("the model declares no inputs; give them with --input")
    return made


def measure(settings: Settings, name: str, arrays: Arrays, clients: int, seconds: float, warmup: int) -> Result:
    from coordinator.client import RequestError

    results = [Result() for _ in range(clients)]
    ready = threading.Barrier(clients)

    def work(result: Result) -> None:
        with settings.client() as client:
            for _ in range(warmup):
                client.forward(name, arrays)
            ready.wait(600)
            end = time.perf_counter() + seconds
            while (begin := time.perf_counter()) < end:
                try:
                    client.forward(name, arrays)
                    result.seconds.append(time.perf_counter() - begin)
                except RequestError as error:
                    code = error.code().name
                    result.errors[code] = result.errors.get(code, 0) + 1

    failures: list[BaseException] = []

    def guarded(result: Result) -> None:
        try:
            work(result)
        except BaseException as error:
            ready.abort()
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(result,), daemon=True) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
    if told:
        raise told[0]
    total = Result()
    for result in results:
        total.seconds += result.seconds
        for code, count in result.errors.items():
            total.errors[code] = total.errors.get(code, 0) + count
    return total


def summarise(result: Result, clients: int, seconds: float, shapes: dict[str, list[int]]) -> dict[str, Any]:
    import numpy as np

    times = np.array(result.seconds or [np.nan])
    p50, p90, p99 = (round(float(value), 4) for value in np.percentile(times, (50, 90, 99)) * 1000)
    return {
        "clients": clients,
        "inputs": shapes,
        "calls": len(result.seconds),
        "errors": result.errors,
        "calls_per_second": round(len(result.seconds) / seconds, 2),
        "milliseconds": {"p50": p50, "p90": p90, "p99": p99, "max": round(float(times.max()) * 1000, 4)},
    }


def machine(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a figure means nothing without."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "ranks": [{"rank": rank["rank"], "device": rank["device"], "host": rank["host"]} for rank in ranks],
    }


def show(name: str, report: dict[str, Any]) -> None:
    times, facts = report["milliseconds"], report["machine"]
    row = (
        report["clients"],
        report["calls"],
        f"{report['calls_per_second']:.1f}",
        *(f"{value:.2f}" for value in times.values()),
    )
    out = console()
    out.print(
        table(
            f"{name} {report['inputs']}", (">clients", ">calls", ">calls/s", ">p50 ms", ">p90", ">p99", ">max"), [row]
        )
    )
    devices = ", ".join(rank["device"] for rank in facts["ranks"])
    out.print(f"{facts['cpu']}, {facts['cores']} cores, {size(facts['memory_bytes'])}; ranks on {devices}")
