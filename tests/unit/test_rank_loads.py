"""What a load tells of each rank: bytes a second while it reads, and when it will be done."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from coordinator.catalog import ModelVersion
from coordinator.rank_loads import RankLoads
from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2


class Call:
    """A daemon's answer to Load: some messages, each at its time."""

    def __init__(self, clock: list[float], told: list[tuple[float, shard_pb2.ShardLoadProgress]]) -> None:
        self.clock, self.told = clock, iter(told)

    async def read(self) -> shard_pb2.ShardLoadProgress:
        self.clock[0], message = next(self.told)
        return message

    def cancel(self) -> None: ...


def test_progress_carries_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    steps = [
        (0.0, "planning", 0, 0),
        (3.0, "reading", 0, 1000),
        (4.0, "reading", 100, 1000),
        (6.0, "reading", 500, 1000),
    ]
    told = [
        (at, shard_pb2.ShardLoadProgress(stage=stage, bytes_done=done, bytes_total=total))
        for at, stage, done, total in steps
    ]
    model = shard_pb2.LoadedModel(bytes_held=1000)
    told.append((8.5, shard_pb2.ShardLoadProgress(stage="loaded", bytes_done=1000, bytes_total=1000, model=model)))
    stub = SimpleNamespace(Load=lambda request, timeout, metadata: Call(clock, told))
    rank = SimpleNamespace(index=3, stub=stub, metadata=(), alive=True)
    entry = ModelVersion("m", "1", "path", coordinator_pb2.LoadOptions())
    seen: list[tuple[str, float, float]] = []

    def note() -> None:
        at = loads.progress[3]
        seen.append((at.stage, at.bytes_per_second, at.eta_seconds))

    loads = RankLoads([rank], entry, None, shard_pb2.Lease(), 30.0, note)  # type: ignore[list-item]

    async def run() -> dict[int, shard_pb2.LoadedModel]:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: clock[0])
        try:
            return await loads.run()
        finally:
            monkeypatch.undo()

    assert asyncio.run(run()) == {3: model}
    # Before it reads, a rank has no speed; then it is that since the first bytes came.
    assert seen == [
        ("planning", 0, 0),
        ("reading", 0, 0),
        ("reading", 0, 0),
        ("reading", 200, 2.5),
        ("loaded", 200, 0),
    ]
