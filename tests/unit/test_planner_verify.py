"""A plan is compared with the model before it is trusted: a wrong rule is found, named, and costs speed only."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensor_parallel.planner import make_plan
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.rules import PARTIAL_RULES, RULES
from tensor_parallel.planner.values import Call

X = {"x": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(torch.nn.functional.gelu(self.up(x))))


class Chaotic(Mlp):
    """Amplifies the rounding of its weights' order of summation until nothing of the digits is left."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e6 * super().forward(x))


def wrong_on_parts(e: Engine, call: Call) -> Any:
    """A rule that scales what it should have left alone."""
    value = call.value("self")
    return e.result(call, e.emit(torch.mul, e.replay(call, self=value.ref), 1.5), e.place(value))


def wrong_on_sums(e: Engine, call: Call) -> Any:
    """A rule that takes an operation for linear which is not."""
    value = call.value("self")
    return e.result(call, e.replay(call, self=value.ref), e.place(value))


@pytest.mark.parametrize(
    ("table", "name", "rule"), [(RULES, "gelu", wrong_on_parts), (PARTIAL_RULES, "tanh", wrong_on_sums)]
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_wrong_rule_is_named_and_its_plan_refused(monkeypatch, caplog, table, name, rule, ranks) -> None:
    assert make_plan(Mlp(), X, ranks).mode == "graph"
    monkeypatch.setitem(table, name, rule)
    with caplog.at_level(logging.WARNING):
        plan = make_plan(Mlp(), X, ranks)
    assert plan.mode == "modules"
    assert f"first difference: {name}" in plan.notes[0]
    assert "falling back" in caplog.text
    assert make_plan(Mlp(), X, ranks, verify=False).mode == "graph"  # it is the comparison that found it


def test_rounding_that_a_model_amplifies_is_no_mistake() -> None:
    plan = make_plan(Chaotic(), X, 2)
    assert (plan.mode, plan.verified) == ("graph", "whole model")


def test_a_mistake_is_found_however_much_rounding_is_amplified(monkeypatch) -> None:
    monkeypatch.setitem(RULES, "gelu", wrong_on_parts)
    assert make_plan(Chaotic(), X, 2).mode == "modules"
