"""The work of planning grows with the depth of a model about linearly; counted, not timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensor_parallel.planner import make_plan, search
from tensor_parallel.planner.engine import Engine


class _Block(nn.Module):
    """A gate too narrow for the ranks beside a pair of linears: something to give up in every layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gate = nn.Linear(width, 2)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        weight = torch.softmax(self.gate(x), -1)
        return x + self.down(hidden) * weight[..., :1] + x * weight[..., 1:]


def _work(monkeypatch: pytest.MonkeyPatch, depth: int) -> tuple[int, int, int]:
    """Plans evaluated, operations visited, and all-reduces of the plan."""
    plans, visits = [], []
    evaluate, visit = search.evaluate, Engine.visit
    with monkeypatch.context() as patch:
        patch.setattr(search, "evaluate", lambda *a, **k: plans.append(1) or evaluate(*a, **k))
        patch.setattr(Engine, "visit", lambda self, *a: visits.append(1) or visit(self, *a))
        model = nn.Sequential(*(_Block(16) for _ in range(depth)))
        plan = make_plan(model, {"input": torch.randn(3, 16)}, 4, verify=False)
    assert plan.mode == "graph"
    return len(plans), len(visits), plan.summary()["all_reduces"]


def test_work_grows_linearly_with_layers(monkeypatch):
    few = _work(monkeypatch, 3)
    many = _work(monkeypatch, 24)
    assert few[2] == 3
    assert many[2] == 24
    assert many[0] <= few[0]  # roles are changed together, however many layers have them
    assert many[1] <= 8 * few[1] * 1.5
