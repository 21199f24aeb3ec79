"""All-reduces that need not wait for one another are one, also where a sum first has to be moved before what is linear
in it; results and gradients stay the model's."""

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

WIDTH = 24


class Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class NormedQueries(nn.Module):
    """Queries and keys are normalised over all heads before they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.qn, self.kn = Rms(WIDTH), Rms(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qn(self.q(x)), self.kn(self.k(x)), self.v(x)
        q, k, v = (t.unflatten(-1, (6, 4)).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))


class NormedFeatures(nn.Module):
    """A normalisation between the two layers of a feed-forward block, and a gate after it."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40)
        self.down, self.norm = nn.Linear(40, WIDTH, bias=bias), Rms(40)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(torch.relu(self.up(x))) * torch.sigmoid(self.gate(x)))


class Towers(nn.Module):
    """Two stacks that meet at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(NormedFeatures(), NormedFeatures())
        self.right = nn.Sequential(NormedFeatures(), NormedFeatures(), NormedFeatures())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.left(x)).mean(1) * torch.tanh(self.right(y)).mean(1)


class NoisyTowers(Towers):
    """Random numbers are drawn in the model's own order, whatever is moved."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left = torch.tanh(self.left(x + torch.rand_like(x))).mean(1)
        return left * torch.tanh(self.right(y + torch.rand_like(y))).mean(1)


CASES: dict[str, tuple[type[nn.Module], int, int]] = {  # the module, its inputs, and the all-reduces that remain
    "statistics of queries and keys": (NormedQueries, 1, 2),
    "a sum and the statistics it waits for": (NormedFeatures, 1, 1),
    "two towers": (Towers, 2, 3),
}


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


@pytest.mark.parametrize(("name", "ranks"), list(zip(CASES, (2, 3, 2), strict=True)))
def test_fewer_all_reduces_and_the_models_results_and_gradients(name: str, ranks: int):
    kind, count, expected = CASES[name]
    inputs = {key: torch.randn(2, 5, WIDTH, dtype=torch.float64) for key in "xy"[:count]}
    model = build(kind)
    whole = {key: value.clone().requires_grad_() for key, value in inputs.items()}
    want = model(**whole)
    want.square().sum().backward()
    tracing = threading.Lock()  # one thread at a time may trace

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            wrapped = DistributedModelWrapper(build(kind), ranks, group.rank, inputs, group=group)
        mine = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        got = wrapped(**mine)
        got.square().sum().backward()
        grads = {key: (wrapped.plan.shards[key], p.grad) for key, p in wrapped.named_parameters()}
        return wrapped.plan, got.detach(), {key: value.grad for key, value in mine.items()}, grads

    for rank, (plan, got, grads_in, grads) in enumerate(run_ranks(ranks, body)):
        summary = plan.summary()
        assert (summary["mode"], summary["all_reduces"], summary["all_gathers"]) == ("graph", expected, 0)
        assert plan.verified == "whole model"
        assert_close(got, want.detach())
        for key, value in whole.items():
            assert_close(grads_in[key], value.grad)
        for key, parameter in model.named_parameters():
            shard, held = grads[key]
            assert_close(held, shard.take(parameter.grad, rank), msg=key)


def test_random_numbers_are_drawn_in_the_models_order():
    inputs = {key: torch.randn(2, 5, WIDTH) for key in "xy"}
    plan = make_plan(NoisyTowers(), inputs, 2)  # verified against the model at one state of the generator
    assert (plan.verified, plan.summary()["all_reduces"]) == ("whole model", 3)


def test_half_precision_is_not_scaled_afterwards():
    """Unnormalised sums might overflow float16, so there the all-reduce waits for the statistics."""
    plan = make_plan(NormedFeatures().half(), {"x": torch.randn(2, 5, WIDTH).half()}, 2, verify=False)
    assert plan.summary()["all_reduces"] == 2


def test_large_payloads_stay_apart():
    """Copying them would cost more than one latency."""
    model = Towers()
    small = {"x": torch.randn(1, 4, WIDTH), "y": torch.randn(1, 4, WIDTH)}
    large = {"x": torch.randn(1, 4000, WIDTH), "y": torch.randn(1, 4000, WIDTH)}
    assert make_plan(model, small, 2, verify=False).summary()["all_reduces"] == 3
    assert make_plan(model, large, 2, verify=False).summary()["all_reduces"] > 6
