"""The short form of `make chaos`: no promise is broken. Its times are for that table, and decide nothing here."""

from __future__ import annotations

import pytest

from tests.chaos import network, overload
from tests.chaos.__main__ import BOUNDS
from tests.chaos.driver import run

pytestmark = pytest.mark.timeout(180)
KINDS = ("rank kill", "rank oom", "rank pause", "coordinator kill", "rank term", "rank stop", "coordinator term")


def test_faults_under_load_break_no_promise():
    outcome = run(2, len(KINDS), seed=3, kinds=KINDS)
    figures = outcome.figures()
    told = (figures, outcome.survivors_touched, outcome.timeline.lies()[:3])
    assert {key: figures[key] for key in BOUNDS} == BOUNDS, told
    assert figures["faults"] == len(KINDS)
    assert figures["ok"] > 100


def test_faults_of_the_network_break_no_promise():
    figures, timeline = network.run(2, 4, seed=1)
    assert {key: figures[key] for key in BOUNDS} == BOUNDS, (figures, timeline.lies()[:3])
    assert figures["ok"] > 20


def test_ten_times_too_many_requests_are_refused_and_the_others_answered():
    figures = overload.run(3.0)
    assert figures["other"] == 0, figures["notes"]
    assert figures["refused"] > figures["accepted"] > 0
    assert figures["survivors_touched"] == 0
