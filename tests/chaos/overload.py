"""Ten times more requests than the ranks can answer: what is accepted keeps its latency, the rest is told at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import psutil

from coordinator.client import Client, RequestError
from tests.benchmarks.cluster import up
from tests.chaos.driver import wait_serving
from tests.chaos.timeline import percentile

FACTORY = "tests.chaos.models:sleeper"
TIMES = 10
CLIENTS = 2  # normal use: as many as fill the pipeline


def run(seconds: float = 30.0) -> dict[str, Any]:
    """Figures of normal use, and of ``seconds`` at ten times its rate."""
    extra = ["--allow-factory", FACTORY]
    with up(2, extra=extra) as target, Client(target) as client:
        client.load("sleeper", FACTORY, max_joined_rows=1)
        health = wait_serving(client, 2)
        pids = [health["coordinator"]["pid"], *(rank["pid"] for rank in health["ranks"])]
        normal, rate = _normal(target, min(5.0, seconds / 2))
        before = _resident(pids)
        accepted, refused, other, peak = _overload(target, rate * TIMES, seconds, pids)
        after = wait_serving(client, 2)
    return {
        "scene": "overload",
        "normal_rate_rps": round(rate, 1),
        "normal_p50": percentile(normal, 0.5),
        "accepted": len(accepted),
        "refused": len(refused),
        "other": len(other),
        "accepted_p50": percentile(accepted, 0.5),
        "accepted_p99": percentile(accepted, 0.99),
        "accepted_p50_over_normal": (percentile(accepted, 0.5) or 0) / (percentile(normal, 0.5) or 1),
        "accepted_p99_over_normal": (percentile(accepted, 0.99) or 0) / (percentile(normal, 0.5) or 1),
        "refused_p50": percentile(refused, 0.5),
        "refused_p99": percentile(refused, 0.99),
        "grown_mib": round(max(peak[pid] - before[pid] for pid in pids) / 2**20, 1),
        "survivors_touched": int(pids != [after["coordinator"]["pid"], *(rank["pid"] for rank in after["ranks"])]),
        "notes": sorted(set(other))[:3],
    }


def _normal(target: str, seconds: float) -> tuple[list[float], float]:
    taken: list[float] = []
    end = time.monotonic() + seconds

    def body() -> None:
        with Client(target) as client:
            while time.monotonic() < end:
                start = time.monotonic()
                client.forward("sleeper", {"x": np.ones((1, 8), np.float32)}, timeout=20)
                taken.append(time.monotonic() - start)

    threads = [threading.Thread(target=body) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, len(taken) / seconds


def _overload(
    target: str, rate: float, seconds: float, pids: list[int]
) -> tuple[list[float], list[float], list[str], dict[int, int]]:
    """An open loop: requests leave on time, whatever became of those before."""
    accepted, refused, other = [], [], []
    peak = _resident(pids)

    def one(client: Client) -> None:
        start = time.monotonic()
        try:
            client.forward("sleeper", {"x": np.ones((1, 8), np.float32)}, timeout=20)
            accepted.append(time.monotonic() - start)
        except RequestError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                refused.append(time.monotonic() - start)
            else:
                other.append(str(error)[:200])

    with Client(target) as client, ThreadPoolExecutor(32) as pool:
        start, sent = time.monotonic(), 0
        while (now := time.monotonic() - start) < seconds:
            while sent < now * rate:
                pool.submit(one, client)
                sent += 1
            if sent % 50 == 0:
                peak = {pid: max(peak[pid], size) for pid, size in _resident(pids).items()}
            time.sleep(0.002)
    return accepted, refused, other, peak


def _resident(pids: list[int]) -> dict[int, int]:
    return {pid: psutil.Process(pid).memory_info().rss for pid in pids}
