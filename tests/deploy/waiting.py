"""Waiting for what must come: with a deadline far beyond what is promised, and the seconds it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from coordinator.client import Client, RequestError
from tests.deploy.model import NAME, Model

_Value = TypeVar("_Value")
DEADLINE = 60.0


def until(condition: Callable[[], _Value], what: str, *, deadline: float = DEADLINE, pause: float = 0.02) -> _Value:
    """The first true value of ``condition``; AssertionError after ``deadline`` seconds."""
    limit = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < limit, f"waited {deadline:g} s for {what}"
        time.sleep(pause)
    return value


def served(client: Client, model: Model, *, deadline: float = DEADLINE) -> float:
    """Seconds until a Forward is answered, and rightly; wrong answers fail at once, errors are tried again."""
    begun = time.monotonic()

    def answered() -> bool:
        nonlocal last
        try:
            model.check(client.forward(NAME, model.inputs, timeout=10))
        except RequestError as error:
            last = error
            return False
        return True

    last: RequestError | None = None
    try:
        until(answered, "an answer", deadline=deadline, pause=0.1)
    except AssertionError as error:
        raise AssertionError(f"{error}; last: {last}") from last
    return time.monotonic() - begun
