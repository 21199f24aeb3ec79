"""What is true now, from recorded state: nothing here asks a rank, waits, or hopes."""

from __future__ import annotations

import asyncio
import os

from coordinator.catalog import HELD, Catalog, ModelVersion
from coordinator.config import Config
from coordinator.fleet import DRAINING, READY, STANDBY, Fleet
from coordinator.forwarding import Forwarder
from coordinator.rank import Rank
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

COORDINATOR = "coordinator"
LIVENESS = (
    "liveness"  # whoever can ask is answered, a coordinator that stands by or drains too: no reason to restart it
)
STALE = 1.5  # seconds: a heartbeat older than this and its interval proves nothing
SLOW_PROBE = 0.75  # seconds: a collective of one element that takes longer is not going to be one


class HealthView:
    def __init__(self, config: Config, catalog: Catalog, fleet: Fleet, forwarder: Forwarder) -> None:
        self._config = config
        self._catalog = catalog
        self._fleet = fleet
        self._forwarder = forwarder
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()

    def is_serving(self, name: str) -> bool | None:
        """None for a name that is neither "", "coordinator", "liveness" nor a model's."""
        if name == "":
            return not self.reason()
        if name == LIVENESS:
            return True
        if name == COORDINATOR:
            return self._fleet.state not in (DRAINING, STANDBY)
        entry = self._catalog.current.get(name)
        if entry is None:
            return False if name in self._catalog.loading else None
        return not self._model_reason(entry)

    def reason(self) -> str:
        """Why "" is not SERVING; empty when it is."""
        group = self._group_reason()
        if group:
            return group
        for entry in self._catalog.current.values():
            why = self._model_reason(entry)
            if why:
                return f"model {entry.label}: {why}"
        return ""

    def _group_reason(self) -> str:
        generation = self._fleet.generation
        if self._fleet.state != READY or generation is None:
            return self._fleet.why()
        now = self._loop.time()
        stale = STALE + self._config.heartbeat
        for rank in self._fleet.ranks:
            if now - rank.seen > stale:
                return f"rank {rank.index} has not answered for {now - rank.seen:.1f} s"
        waiting = generation.waiting()
        limit = SLOW_PROBE + self._config.probe_interval
        if waiting is None and now - generation.last_completed > limit:
            return f"no collective has run for {now - generation.last_completed:.1f} s"
        if waiting is not None and waiting[1] == "health probe" and waiting[0] > SLOW_PROBE:
            ranks = ", ".join(map(str, self._fleet.behind(waiting[2])))
            return f"rank {ranks} has not finished the {waiting[1]} for {waiting[0]:.1f} s"
        return ""

    def _model_reason(self, entry: ModelVersion) -> str:
        if entry.failure:
            return entry.failure
        group = self._group_reason()
        if group:
            return group
        if entry.live_in != self._fleet.number:
            return "is being restored" if entry.served else "is being loaded"
        return ""

    def response(self) -> pb.HealthResponse:
        reason = self.reason()
        answer = pb.HealthResponse(serving=not reason, reason=reason, generation=self._fleet.number)
        answer.coordinator.pid = os.getpid()
        answer.coordinator.state = self._fleet.state
        answer.coordinator.owner = self._fleet.owner
        answer.coordinator.queue_depth = self._forwarder.queue.depth
        answer.coordinator.in_flight = self._forwarder.requests - self._forwarder.queue.depth
        answer.coordinator.uptime_seconds = self._loop.time() - self._started
        entries = dict(self._catalog.loading) | self._catalog.current
        for name in sorted(entries):
            entry = entries[name]
            why = "is being loaded" if name not in self._catalog.current else self._model_reason(entry)
            answer.models.add(name=name, version=entry.version, serving=not why, reason=why)
        answer.ranks.extend(self._rank(rank) for rank in self._fleet.ranks)
        return answer

    def _rank(self, rank: Rank) -> pb.RankHealth:
        health = pb.RankHealth(rank=rank.index, address=rank.address, restarts=rank.restarts, last_error=rank.error)
        health.state = "LOST"
        health.seconds_since_heartbeat = self._loop.time() - rank.seen if rank.seen else -1.0
        status = rank.status
        if status is not None:
            health.pid, health.host, health.device = status.pid, status.host, status.device
            health.loads, health.generation = status.loads, status.generation
            health.bytes_held, health.peak_bytes = status.bytes_held, status.peak_bytes
            health.last_error = rank.error or status.last_error
            health.models.extend(f"{m.name}@{m.version}" for m in status.models if m.state in HELD)
            if rank.alive:
                health.state = status.state
        return health
