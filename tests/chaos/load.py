"""Continuous load: clients that check every answer against the unsharded model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.client import Client
from tests.chaos.models import WIDTH, deep_mlp
from tests.chaos.timeline import Answer, Sample, Timeline

DEADLINE = 10.0
RETRY_DEADLINE = 60.0
TOLERANCE = 1e-4


class Reference:
    """The unsharded model's answers, computed once for a fixed set of requests."""

    def __init__(self, count: int = 32) -> None:
        model, _ = deep_mlp()
        generator = np.random.default_rng(0)
        self.requests = [generator.standard_normal((1 + i % 4, WIDTH), dtype=np.float32) for i in range(count)]
        with torch.inference_mode():
            self.answers = [model(torch.from_numpy(x)).numpy() for x in self.requests]

    def right(self, index: int, answer: np.ndarray) -> bool:
        want = self.answers[index]
        return answer.shape == want.shape and float(np.abs(answer - want).max()) <= TOLERANCE * float(
            np.abs(want).max()
        )


class Load:
    """``clients`` threads without retries, one with retries, and one that samples health, until ``stop`` is set."""

    def __init__(self, target: str, reference: Reference, timeline: Timeline, clients: int = 6) -> None:
        self.target, self.reference, self.timeline = target, reference, timeline
        self.stop = threading.Event()
        bodies: list[Callable[[], None]] = [lambda i=i: self._requests(i, retries=False) for i in range(clients)]
        bodies += [lambda: self._requests(clients, retries=True), self._health]
        self.threads = [threading.Thread(target=body, daemon=True) for body in bodies]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(RETRY_DEADLINE + 10)
        if any(thread.is_alive() for thread in self.threads):
            raise RuntimeError("a client hangs past every deadline")

    def _requests(self, seed: int, *, retries: bool) -> None:
        index = seed
        with Client(self.target, retries=100 if retries else 0) as client:
            while not self.stop.is_set():
                index = (index + 1) % len(self.reference.requests)
                start = time.monotonic()
                outcome, detail = self._one(client, index, RETRY_DEADLINE if retries else DEADLINE)
                self.timeline.add(Answer(start, time.monotonic(), outcome, retries, detail))
                if outcome != "ok":
                    self.stop.wait(0.02)

    def _one(self, client: Client, index: int, timeout: float) -> tuple[str, str]:
        try:
            outputs = client.forward("chaos", {"x": self.reference.requests[index]}, timeout=timeout)
        except Exception as error:
            code = getattr(error, "code", None)
            return (code().name if code else type(error).__name__), str(error)[:300]
        return (
            ("ok", "") if self.reference.right(index, next(iter(outputs.values()))) else ("wrong", f"request {index}")
        )

    def _health(self) -> None:
        with grpc.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not self.stop.wait(0.1):
                try:
                    reply = stub.Check(health_pb2.HealthCheckRequest(service="chaos"), timeout=1)
                    serving, reason = reply.status == health_pb2.HealthCheckResponse.SERVING, ""
                except grpc.RpcError as error:
                    serving, reason = False, str(error.code())
                # From when it was told on: what happened while it was on its way does not make it false.
                self.timeline.samples.append(Sample(time.monotonic(), serving, reason))
