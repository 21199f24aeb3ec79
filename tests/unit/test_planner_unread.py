"""Stored tensors that a forward does not read are held divided at no cost, and still belong to the checkpoint."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.planner import make_plan
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 30)
        self.register_buffer("quantised", torch.arange(90, dtype=torch.int32).reshape(9, 10))
        self.register_buffer("counted", torch.zeros(64))

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        y = torch.relu(self.body(x))
        return self.head(y) if task is None else self.other(y) * self.quantised.sum() + task


def build() -> nn.Module:
    torch.manual_seed(0)
    return TwoHeads()


def test_unread_parameters_and_buffers_are_divided_without_a_collective():
    plan = make_plan(build(), {"x": torch.randn(3, 8)}, 3)
    assert plan.summary()["all_reduces"] + plan.summary()["all_gathers"] <= 2
    assert (plan.shards["other.weight"].dim, plan.shards["quantised"].dim, plan.shards["counted"].dim) == (0, 1, 0)
    assert max(plan.bytes_per_rank) < 0.4 * plan.total_bytes


def test_another_call_may_read_them_and_the_checkpoint_has_them():
    model, x = build(), torch.randn(3, 8)
    task = torch.randn(3, 30)
    tracing = threading.Lock()  # one thread at a time may trace

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            wrapped = DistributedModelWrapper(build(), 2, group.rank, {"x": x}, group=group)
        with torch.no_grad():
            first = wrapped(x=x)
            with tracing:  # planned at the first call of its kind, before any collective of that call
                wrapped._inner[0].runner_for((), {"x": x, "task": task})
            return first, wrapped(x=x, task=task), wrapped.full_state_dict()

    results = run_ranks(2, body)
    with torch.no_grad():
        for first, second, _ in results:
            assert_close(first, model(x))
            assert_close(second, model(x, task), rtol=1e-4, atol=1e-2)
    assert_close(results[0][2], model.state_dict())


def test_what_is_no_module_is_refused_by_name():
    with pytest.raises(TypeError, match=r"model: an nn\.Module is needed, not str"):
        DistributedModelWrapper("x", 1, 0)


def test_a_model_without_tensors_has_no_bytes():
    plan = make_plan(nn.ReLU(), {"input": torch.zeros(2, 3)}, 2)
    assert (plan.total_bytes, plan.bytes_per_rank) == (0, (0, 0))
