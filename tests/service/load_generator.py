"""Callers that never stop asking, and remember every answer: its time, its code, and whether it was right."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import grpc
import numpy as np

from tests.service.clusters import Caller


@dataclass(frozen=True)
class Outcome:
    """``code`` None: answered. Times are of time.monotonic()."""

    sent: float
    done: float
    code: grpc.StatusCode | None
    details: str
    right: bool
    version: str


class LoadGenerator:
    """``clients`` threads call ``model`` with ``inputs`` until left; wrong is what differs from ``wanted``."""

    def __init__(self, address: str, model: str, inputs: dict, wanted: np.ndarray, *, clients: int = 4) -> None:
        self.outcomes: list[Outcome] = []
        self._stop = threading.Event()
        self._arguments = (address, model, inputs, wanted)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> LoadGenerator:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *about) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a caller hangs"

    def _run(self) -> None:
        address, model, inputs, wanted = self._arguments
        caller = Caller(address)
        while not self._stop.is_set():
            sent = time.monotonic()
            code, details, right = None, "", True
            try:
                output = caller.forward(model, inputs, timeout=15)["output"]
                right = bool(np.allclose(output, wanted, rtol=1e-4, atol=1e-5))
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                self._stop.wait(0.005)
            self.outcomes.append(Outcome(sent, time.monotonic(), code, details, right, ""))
        caller.close()

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.code is not None]

    def answered_since(self, moment: float) -> int:
        return sum(outcome.code is None and outcome.sent > moment for outcome in list(self.outcomes))

    def all_right(self) -> bool:
        return all(outcome.right for outcome in self.outcomes)

    def waited(self, moment: float) -> list[float]:
        """Seconds that those who waited when something broke at ``moment``, or asked soon after, had to wait."""
        failed = [outcome for outcome in list(self.outcomes) if outcome.code is not None and outcome.done > moment]
        told = min((outcome.done for outcome in failed), default=0.0)
        return [outcome.done - max(moment, outcome.sent) for outcome in failed if outcome.sent <= told]
