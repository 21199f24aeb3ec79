"""The recorded state, as one message. Built from what other parts wrote down; never asks the executor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protos.tensor_parallel.v1 import shard_pb2
from shardd.generation import Generations
from shardd.identity import Identity
from shardd.models import Models
from shardd.progress import NEVER_MILLISECONDS

if TYPE_CHECKING:
    from shardd.devices import Device
    from shardd.progress import Progress


@dataclass
class Board:
    """Where the state is read from. ``device`` and ``progress`` come once torch is there."""

    identity: Identity
    generations: Generations
    models: Models
    store_address: str
    device: Device | None = None
    progress: Progress | None = None
    draining: bool = field(default=False)

    def status(self) -> shard_pb2.StatusResponse:
        who, now = self.identity, self.generations.standing()
        response = shard_pb2.StatusResponse(
            rank=who.rank,
            world_size=who.world_size,
            pid=who.pid,
            incarnation=who.incarnation,
            host=who.host,
            host_id=who.host_id,
            state=now.state.value,
            generation=now.generation,
            highest_generation=now.highest,
            owner=now.owner,
            lease_milliseconds=int(1000 * now.lease_seconds) if now.owner else 0,
            last_error=now.last_error,
            loads=self.models.loads,
            bytes_held=self.models.bytes_held(),
            models=self.models.describe(),
            store_address=self.store_address,
            since_collective_milliseconds=NEVER_MILLISECONDS,
            draining=self.draining,
        )
        if self.device is not None and self.progress is not None:
            self._add_progress(response, self.device, self.progress)
        return response

    def _add_progress(self, response: shard_pb2.StatusResponse, device: Device, progress: Progress) -> None:
        response.device = device.name
        response.device_memory = device.memory
        response.peak_bytes = device.peak_bytes()
        response.executed = progress.executed
        response.collectives = progress.collectives()
        response.since_collective_milliseconds = progress.since_collective_milliseconds()
        busy = progress.busy_seconds()
        response.busy_milliseconds = max(1, int(1000 * busy)) if busy else 0
