"""Many generations in the same daemons leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import endurance


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("backend", "count"), [("gloo", 200), ("shm", 50)])
def test_many_generations_leave_nothing_behind(tmp_path: Path, backend: str, count: int) -> None:
    figures = endurance.run(tmp_path, count, backend)
    assert figures["threads_grown"] <= 2
    assert figures["descriptors_grown"] <= 4
    assert figures["generations_grown_mib"] < 10
    assert figures["loads"] == 1
