"""Times any server of the Open Inference Protocol with tritonclient: ours, Triton and the floors by one yardstick."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import tritonclient.grpc as triton

from tests.benchmarks.report import timed

Call = Callable[[], np.ndarray]


def requester(client: triton.InferenceServerClient, model: str, x: np.ndarray, *, name: str = "x") -> Call:
    """A function that sends ``x`` and returns the first output; the request is built anew each time, as users do."""

    def call() -> np.ndarray:
        tensor = triton.InferInput(name, list(x.shape), triton_dtype(x))
        tensor.set_data_from_numpy(x)
        result = client.infer(model, [tensor])
        return result.as_numpy(result.get_response().outputs[0].name)

    return call


def triton_dtype(x: np.ndarray) -> str:
    return {"float32": "FP32", "int64": "INT64", "float16": "FP16"}[x.dtype.name]


def latency(
    target: str, model: str, x: np.ndarray, *, repeats: int, name: str = "x", seconds: float = 20.0
) -> list[float]:
    """Seconds of each request of one client, sorted."""
    with triton.InferenceServerClient(target) as client:
        return timed(
            requester(client, model, x, name=name),
            repeats=repeats,
            warmup=10 if x.nbytes < 1 << 20 else 2,
            seconds=seconds,
        )


def throughput(
    target: str, model: str, x: np.ndarray, *, clients: int, seconds: float, name: str = "x"
) -> tuple[float, list[float]]:
    """(requests per second, seconds of each request) of ``clients`` threads, each with a connection of its own."""
    taken: list[float] = []
    failures: list[BaseException] = []
    start_line = threading.Barrier(clients + 1)
    stop = threading.Event()

    def run() -> None:
        mine: list[float] = []
        options = [("grpc.use_local_subchannel_pool", 1)]
        try:
            with triton.InferenceServerClient(target, channel_args=options) as client:
                call = requester(client, model, x, name=name)
                call()
                start_line.wait(60)
                while not stop.is_set():
                    began = time.perf_counter()
                    call()
                    mine.append(time.perf_counter() - began)
        except BaseException as error:
            failures.append(error)
            start_line.abort()
        taken.extend(mine)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    start_line.wait(60)
    began = time.perf_counter()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join(60)
    elapsed = time.perf_counter() - began
    if failures:
        raise failures[0]
    return len(taken) / elapsed, sorted(taken)
