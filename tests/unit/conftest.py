"""For tests of single modules."""

from __future__ import annotations

import pytest

from tensor_parallel import planned


@pytest.fixture(autouse=True)
def nothing_is_planned_yet() -> None:
    """By models of tests before, which live until they are collected."""
    planned._keepers.clear()
