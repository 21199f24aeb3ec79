"""What a daemon logs of a load."""

from __future__ import annotations

import time
from typing import Any

from protos.tensor_parallel.v1 import shard_pb2
from shardd.loading import LoadedWeights, Loader, fingerprint
from shardd.metrics import Metrics
from shardd.models import Models


class Log:
    def __init__(self) -> None:
        self.lines: dict[str, dict[str, Any]] = {}

    def info(self, event: str, **fields: Any) -> None:
        self.lines[event] = fields


class Served:
    bytes_held = 1000
    planned_by = "a peer"


def logged(stages: list[tuple[str, int]]) -> dict[str, Any]:
    """The line of a load that reports these, 20 ms after each other, and then plans for 0.2 s more."""

    def read(request: Any, report: Any, cancelled: Any) -> LoadedWeights:
        for stage, done in stages:
            time.sleep(0.02)
            report(stage, done, 1000)
        time.sleep(0.2)
        return LoadedWeights(Served(), shard_pb2.LoadedModel(), {}, True, False, None, 1200, [])  # type: ignore[arg-type]

    log = Log()
    loader = Loader(Models(), Metrics(0), read, log, lambda message: None)  # type: ignore[arg-type]
    request = shard_pb2.ShardLoadRequest(name="m", version="1", path="p")
    assert [message.stage for message in loader.load(request, lambda leave: True)][-1] == "loaded"
    return log.lines["load_finished"]


def test_reading_is_timed_by_itself() -> None:
    line = logged([("planning", 0), ("reading", 0), ("reading", 500), ("reading", 1000)])
    assert line["seconds"] - line["reading_seconds"] >= 0.2
    assert line["reading_seconds"] >= 0.04
    assert line["bytes_per_second"] <= 1000 / 0.04
    assert line["bytes_read"] == 1200
    assert line["planned_by"] == "a peer"


def test_nothing_read_has_no_speed() -> None:
    line = logged([("planning", 0), ("reading", 1000)])
    assert (line["reading_seconds"], line["bytes_per_second"]) == (0, 0)


def test_a_plan_does_not_make_it_another_load() -> None:
    request = shard_pb2.ShardLoadRequest(name="m", version="1", path="p")
    given = shard_pb2.ShardLoadRequest(name="m", version="1", path="p", plan=b"a peer's")
    assert fingerprint(given) == fingerprint(request)
    assert fingerprint(given) != fingerprint(shard_pb2.ShardLoadRequest(name="m", version="1", path="q"))
