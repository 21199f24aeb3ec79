"""Pieces of a fused weight that every rank holds while the rest is divided: multi-query attention and its like."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.planner import make_plan
from tensor_parallel.planner.atoms import Atoms
from tensor_parallel.planner.placement import ALL, counts, positions
from tensor_parallel.planner.shard import Shard
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks

WIDTH, HEADS, SIZE = 48, 12, 4


class MultiQuery(nn.Module):
    """Query heads and one key and one value head in one projection; taken apart by ``split`` or after a view."""

    def __init__(self, by_view: bool = False) -> None:
        super().__init__()
        self.by_view = by_view
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, WIDTH + 2 * SIZE), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(self.norm(x))
        if self.by_view:
            heads = fused.unflatten(-1, (HEADS + 2, SIZE))
            q, k, v = heads[..., :-2, :], heads[..., [-2], :], heads[..., [-1], :]
        else:
            q, k, v = (t.unflatten(-1, (-1, SIZE)) for t in fused.split((WIDTH, SIZE, SIZE), -1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k.expand(q.shape), v.expand(q.shape), is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Scan(nn.Module):
    """A state space block: channels by head, one input matrix for all heads, a depthwise convolution over both.

    The input matrix could be divided as well, by ``state``; but a product of activations would then be a sum of ranks'.
    """

    def __init__(self, state: int) -> None:
        super().__init__()
        self.inner, self.state = WIDTH, state
        self.project = nn.Linear(WIDTH, 2 * self.inner + self.state)
        both = self.inner + self.state
        self.conv = nn.Conv1d(both, both, 3, padding=2, groups=both)
        self.out = nn.Linear(self.inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed = self.project(x).split((self.inner, self.inner + self.state), -1)
        mixed = torch.tanh(self.conv(mixed.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        value, b = mixed.split((self.inner, self.state), -1)
        scores = b @ b.transpose(-1, -2)
        y = (scores.unsqueeze(1) @ value.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return x + self.out(y * torch.sigmoid(gate))


KINDS: dict[str, Any] = {
    "split": MultiQuery,
    "view": lambda: MultiQuery(by_view=True),
    "scan of one state": lambda: Scan(1),
    "scan of several states": lambda: Scan(4),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().double()


@pytest.mark.parametrize(
    ("kind", "ranks"), [("split", 2), ("view", 3), ("scan of one state", 2), ("scan of several states", 2)]
)
def test_one_all_reduce_and_results_gradients_norms_and_checkpoints_are_the_models(kind: str, ranks: int):
    model, x = build(kind), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    whole = x.clone().requires_grad_()
    want = model(whole)
    want.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    tracing = threading.Lock()  # one thread at a time may trace

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            wrapped = DistributedModelWrapper(build(kind), ranks, group.rank, {"x": x}, group=group)
        mine = x.clone().requires_grad_()
        got = wrapped(x=mine)
        got.square().sum().backward()
        held = {name: p.grad.clone() for name, p in wrapped.named_parameters()}
        found = wrapped.clip_grad_norm_(1.0)
        return wrapped.plan, got.detach(), mine.grad, held, found, wrapped.full_state_dict()

    results = run_ranks(ranks, body)
    for rank, (plan, got, grad, held, found, _) in enumerate(results):
        summary = plan.summary()
        assert (summary["mode"], summary["all_reduces"], summary["all_gathers"]) == ("graph", 1, 0)
        fused = next(shard for name, shard in plan.shards.items() if name in ("qkv.weight", "project.weight"))
        assert fused.dim == 0
        assert sum(fused.local_size(r) for r in range(ranks)) > plan_rows(model)
        assert_close(got, want.detach())
        assert_close(grad, whole.grad)
        for name in grads:
            assert_close(held[name], plan.shards[name].take(grads[name], rank), msg=name)
        assert_close(found, norm)
    assert_close(results[0][5], model.state_dict())


def plan_rows(model: nn.Module) -> int:
    return (model.qkv if hasattr(model, "qkv") else model.project).out_features


def test_keys_that_become_an_output_are_gathered_with_what_is_shared():
    class Shown(MultiQuery):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.qkv(self.norm(x))

    torch.manual_seed(0)
    model, x = Shown().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plan = make_plan(model, {"x": x}, 2)
    assert plan.verified == "whole model"
    assert plan.summary()["all_gathers"] <= 1


def test_owners_of_shared_indices():
    owner = np.array([0, 0, ALL, 1, ALL, 1])
    assert positions(owner, 0).tolist() == [0, 1, 2, 4]
    assert positions(owner, 1).tolist() == [2, 3, 4, 5]
    assert counts(owner, 2) == (4, 4)
    shard = Shard.from_indices(0, [positions(owner, r).tolist() for r in range(2)])
    assert shard.counted(0) is None
    assert shard.counted(1).tolist() == [1, 3]


def test_a_large_piece_is_not_shared_and_what_is_joined_to_it_counts():
    atoms = Atoms()
    fused, other = atoms.create("fused", 16), atoms.create("other", 4)
    assert not atoms.share(fused[8:], 0.25)
    atoms.union(fused[12:14], other[:2])
    assert not atoms.share(fused[12:14], 0.25)  # half of the other weight
    assert atoms.share(fused[14:], 0.25)
    atoms.union(fused[:2], fused[2:4])
    ranks = atoms.deal(2)
    assert (ranks[fused[14:]] == ALL).all()
    assert set(ranks[fused[:14]].tolist()) == {0, 1}
