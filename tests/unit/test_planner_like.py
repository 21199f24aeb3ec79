"""Values shaped like another one that is divided: masks and norms spread over heads, with their gradients."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks

WIDTH, HEADS, SIZE = 28, 7, 4


class Attention(nn.Module):
    """Every head's scores get a bias that is computed once for all heads, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(self.attend(x, q, k, v).transpose(1, 2).flatten(2))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        scores = scores + x.mean(-1)[:, None, None].expand_as(scores)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(mask.expand_as(scores), -1e9).softmax(-1) @ v


class Cosine(Attention):
    """Queries and keys of length one, heads within the batch: the norm is spread over a dimension of free size."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(-1, x.shape[1], SIZE) for t in (q, k, v))
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-1, -2)
        return (scores.softmax(-1) @ v).reshape(-1, HEADS, x.shape[1], SIZE)


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


@pytest.mark.parametrize(("kind", "ranks"), [(Attention, 2), (Attention, 3), (Cosine, 2), (Cosine, 4)])
def test_stays_divided_with_the_models_results_and_gradients(kind: type[nn.Module], ranks: int):
    """Seven heads: no number of ranks divides them."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    model = build(kind)
    whole = x.clone().requires_grad_()
    want = model(whole)
    want.square().sum().backward()
    tracing = threading.Lock()  # one thread at a time may trace

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            wrapped = DistributedModelWrapper(build(kind), ranks, group.rank, {"x": x}, group=group)
        mine = x.clone().requires_grad_()
        got = wrapped(x=mine)
        got.square().sum().backward()
        grads = {name: (wrapped.plan.shards[name], p.grad) for name, p in wrapped.named_parameters()}
        return wrapped.plan, got.detach(), mine.grad, grads

    for rank, (plan, got, grad, grads) in enumerate(run_ranks(ranks, body)):
        summary = plan.summary()
        assert (summary["mode"], summary["all_reduces"], summary["all_gathers"]) == ("graph", 1, 0)
        assert plan.verified == "whole model"
        assert_close(got, want.detach())
        assert_close(grad, whole.grad)
        for name, parameter in model.named_parameters():
            shard, held = grads[name]
            if parameter.grad is not None:
                assert_close(held, shard.take(parameter.grad, rank), msg=name)
