"""A rule that fails in a way nobody foresaw costs the plan, not the model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.planner import make
from tensor_parallel.planner.rules import RULES
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks


def test_a_planner_fault_is_told_and_the_model_runs(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(make.log, "exception", lambda message, *args: told.append(message % args))

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setitem(RULES, "tanh", broken)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), torch.randn(3, 8)

    tracing = threading.Lock()  # one thread at a time may trace

    def body(group: Group) -> Any:
        with tracing:
            wrapped = DistributedModelWrapper(model, 2, group.rank, {"input": x}, group=group)
        with torch.no_grad():
            return wrapped.plan, wrapped(input=x)

    results = run_ranks(2, body)
    assert told == ["Sequential: the planner failed; falling back to layers sharded one by one"] * 2
    for plan, got in results:
        assert plan.mode == "modules"
        assert "ZeroDivisionError" in plan.notes[0]
        assert_close(got, model(x).detach())
