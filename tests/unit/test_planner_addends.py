"""A bias added to a pending sum is divided too: each rank holds, trains and adds its own part of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.planner import make_plan, runtime
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks


def mlp(width: int, hidden: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).to(dtype)


def test_four_ranks_hold_exactly_a_quarter_each():
    with torch.device("meta"):
        model = mlp(4096, 16384, torch.float32)
    plan = make_plan(model, {"input": torch.zeros(2, 4096)}, 4, verify=False)
    summary = plan.summary()
    assert (summary["mode"], summary["all_reduces"], summary["all_gathers"]) == ("graph", 1, 0)
    assert plan.bytes_per_rank == (plan.total_bytes // 4,) * 4


@pytest.mark.parametrize("ranks", [2, 3])
def test_outputs_gradients_and_checkpoints_are_the_models(ranks: int):
    model, x = mlp(1024, 96), torch.randn(5, 1024, dtype=torch.float64)
    whole = x.clone().requires_grad_()
    want = model(whole)
    want.square().sum().backward()

    tracing = threading.Lock()  # one thread at a time may trace

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            wrapped = DistributedModelWrapper(mlp(1024, 96), ranks, group.rank, {"input": x}, group=group)
        mine = x.clone().requires_grad_()
        got = wrapped(input=mine)
        got.square().sum().backward()
        grads = {name: (wrapped.plan.shards[name], p.grad) for name, p in wrapped.named_parameters()}
        return got.detach(), mine.grad, grads, wrapped.full_state_dict()

    results = run_ranks(ranks, body)
    for rank, (got, grad, grads, _) in enumerate(results):
        assert_close(got, want.detach())
        assert_close(grad, whole.grad)
        assert grads["2.bias"][0].dim == 0
        for name, parameter in model.named_parameters():
            shard, held = grads[name]
            assert_close(held, shard.take(parameter.grad, rank), msg=name)
    assert_close(results[0][3], model.state_dict())


@pytest.mark.parametrize("owners", [(0, 0, 0, 1, 1), (1, 0, 1, 0, 0), (1, 1, 1, 1, 1)])
def test_parts_may_lie_anywhere(owners: tuple[int, ...]):
    bias = torch.randn(5, dtype=torch.float64)
    terms = [torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2)]
    total: Tensor = torch.zeros(2, 3, 5, dtype=torch.float64)
    for rank, term in enumerate(terms):
        held = tuple(i for i, owner in enumerate(owners) if owner == rank)
        index = range(held[0], held[-1] + 1) if held and held[-1] - held[0] + 1 == len(held) else held
        total = total + runtime.add_part(term.clone(), bias[list(held)], 0.5, index)
    assert_close(total, sum(terms) + 0.5 * bias)


def test_a_bias_that_is_used_elsewhere_too_stays_whole():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(1024, 96)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.body[2].bias

    plan = make_plan(Twice(), {"x": torch.randn(2, 1024, dtype=torch.float64)}, 2)
    assert plan.shards["body.2.bias"].dim is None
    assert plan.summary()["all_gathers"] == 0
