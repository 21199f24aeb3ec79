"""The short form of `make chaos`."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import BOUNDS
from tests.chaos.driver import run


@pytest.mark.timeout(180)
def test_faults_under_load_break_no_promise():
    kinds = ("rank kill", "rank stop", "coordinator kill", "rank term")
    outcome = run(2, 6, seed=3, kinds=kinds)
    figures = outcome.figures()
    assert {key: figures[key] for key in BOUNDS} == BOUNDS, (
        figures,
        outcome.survivors_touched,
        outcome.timeline.lies()[:3],
    )
    assert figures["faults"] == 6
    assert figures["ok"] > 100
