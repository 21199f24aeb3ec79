"""Forwards are told of when there is time: all of them, in order, each with the moment when it was answered."""

import io
import json
import time
from collections.abc import Iterator

import pytest
import structlog

from shardd import reports
from shardd.logging import configure
from shardd.metrics import Metrics
from shardd.reports import Forwarded, Reports


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    yield stream
    structlog.reset_defaults()


def made(out: io.StringIO) -> tuple[Reports, Metrics]:
    metrics = Metrics(0)
    return Reports(metrics, configure("info", "json", rank=0, stream=out)), metrics


def forwarded(metrics: Metrics, seq: int, answered: float) -> Forwarded:
    return Forwarded(metrics.model("m"), 7, seq, "m", f"r{seq}", answered, 0.3, 0.2, 0.1, 0.05)


def test_all_are_told_of_in_order_and_with_their_own_time(out: io.StringIO) -> None:
    told, metrics = made(out)
    for seq in range(3):
        told.add(forwarded(metrics, seq, 1e9 + seq))
    assert told.pending
    assert not out.getvalue()
    told.write()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["seq"], line["request_id"]) for line in lines] == [(0, "r0"), (1, "r1"), (2, "r2")]
    assert lines[1]["ts"] == "2001-09-09T01:46:41Z"
    assert (lines[0]["seconds"], lines[0]["forward_seconds"], lines[0]["collective_seconds"]) == (0.3, 0.2, 0.1)
    assert metrics.registry.get_sample_value("shardd_forward_seconds_count", {"rank": "0", "model": "m"}) == 3
    assert metrics.registry.get_sample_value("shardd_commands_total", {"rank": "0", "result": "ok"}) == 3
    assert not told.pending
    told.write()
    assert len(out.getvalue().splitlines()) == 3


def test_they_wait_until_they_are_many_or_one_is_old(out: io.StringIO) -> None:
    told, metrics = made(out)
    assert not told.due
    for seq in range(reports.MOST):
        assert not told.due
        told.add(forwarded(metrics, seq, time.time()))
    assert told.due
    told.write()
    told.add(forwarded(metrics, 0, time.time() - 2 * reports.LATEST))
    assert told.due
