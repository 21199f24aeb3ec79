"""What is told of forwards that have been answered: a log line each, and the metrics.

A forward drives everything but weights out of a core's caches. To tell of it at once takes several times as long as to
tell of many together, and keeps the core from whoever was just answered. So it waits for a moment without work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

from shardd.logging import Logger
from shardd.metrics import Metrics, ModelMetrics

PATIENCE = 0.005
"""Seconds without a command after which there is time to tell."""
MOST = 32
LATEST = 0.1
"""Seconds after which a forward is told of whatever there is to do."""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One forward. Times are in seconds; ``answered`` is when, since the epoch."""

    series: ModelMetrics
    generation: int
    seq: int
    model: str
    request_ids: str
    answered: float
    total: float
    forward: float
    collective: float
    copy: float


class Reports:
    """For one thread, the executor's."""

    def __init__(self, metrics: Metrics, log: Logger) -> None:
        self._metrics = metrics
        self._log = log
        self._pending: list[Forwarded] = []

    def add(self, forwarded: Forwarded) -> None:
        self._pending.append(forwarded)

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    @property
    def due(self) -> bool:
        """Whether they must not wait any longer."""
        pending = self._pending
        return len(pending) >= MOST or (bool(pending) and time.time() - pending[0].answered > LATEST)

    def write(self) -> None:
        pending, self._pending = self._pending, []
        for each in pending:
            self._metrics.forward(each.series, each.forward, each.collective, each.copy)
            self._metrics.command("ok")
            self._log.info(
                "forward",
                ts=datetime.fromtimestamp(each.answered, UTC).isoformat().replace("+00:00", "Z"),
                generation=each.generation,
                model=each.model,
                request_id=each.request_ids,
                seq=each.seq,
                seconds=round(each.total, 6),
                forward_seconds=round(each.forward, 6),
                collective_seconds=round(each.collective, 6),
            )
