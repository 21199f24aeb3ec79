"""all-MiniLM-L6-v2: sequences per second, served on two ranks of one thread against torch in process on two threads."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from coordinator.client import Client
from tests.benchmarks.cluster import up
from tests.benchmarks.report import Report
from tests.checkpoints import minilm as checkpoint

BATCH, TOKENS = 8, 128
CLIENTS = 2
"""One whose answer is on its way while the other's forward runs."""
ROUNDS = 5


def minilm(*, seconds: float = 2.0) -> Report:
    """The two take turns; a figure is the median over rounds of the rate in one."""
    report = Report("all-MiniLM-L6-v2, 2 ranks x 1 thread", "python -m tests.benchmarks minilm")
    folder = checkpoint()
    generator = np.random.default_rng(0)
    inputs = {
        "input_ids": generator.integers(1000, 30000, (BATCH, TOKENS)),
        "attention_mask": np.ones((BATCH, TOKENS), np.int64),
    }
    local = _in_process(folder, inputs)
    with up(2, model_root=str(folder.parent)) as target:
        with Client(target) as client:
            client.load("minilm", str(folder))
            served = client.forward("minilm", inputs, outputs=["last_hidden_state"])["last_hidden_state"]
        error = float(np.abs(served - local()).max() / np.abs(local()).max())
        rounds = [(_rate([local], seconds), _served(target, inputs, seconds)) for _ in range(ROUNDS)]
    report.add(
        sequences=f"{BATCH} x {TOKENS} tokens, {CLIENTS} clients",
        in_process_per_second=statistics.median(one for one, _ in rounds),
        served_per_second=statistics.median(two for _, two in rounds),
        served_over_in_process=statistics.median(two / one for one, two in rounds),
        largest_error=error,
    )
    return report


def _in_process(folder: Path, inputs: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    import transformers

    torch.set_num_threads(2)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def call() -> np.ndarray:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).last_hidden_state.numpy()

    return call


def _served(target: str, inputs: dict[str, np.ndarray], seconds: float) -> float:
    clients = [Client(target) for _ in range(CLIENTS)]
    try:
        wanted = ["last_hidden_state"]
        return _rate([lambda c=c: c.forward("minilm", inputs, outputs=wanted) for c in clients], seconds)
    finally:
        for client in clients:
            client.close()


def _rate(calls: list[Callable[[], object]], seconds: float) -> float:
    """Sequences per second of all ``calls``, each in a thread of its own."""
    done: list[int] = []

    def run(call: Callable[[], object]) -> None:
        count = 0
        while time.perf_counter() < end:
            call()
            count += 1
        done.append(count)

    for call in calls:
        call()
    began = time.perf_counter()
    end = began + seconds
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if len(done) != len(calls):
        raise RuntimeError("a client failed")
    return sum(done) * BATCH / (time.perf_counter() - began)
