"""Settings for every test: no network, few threads per process, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Hundreds of processes import our packages; the first compiles them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

SHARED_MEMORY = Path("/dev/shm")


def _segments() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


@pytest.fixture(scope="session", autouse=True)
def _no_shared_memory_left() -> Iterator[None]:
    before = _segments()
    yield
    left = {name for name in _segments() - before if not name.startswith(("sem.", "psm_"))}
    assert not left, f"left behind in /dev/shm: {sorted(left)}"
