"""Writes in place are rewritten where the graph alone shows how, and left to the general method where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from tensor_parallel.planner.functional import functionalise


class _Views(nn.Module):
    """Writes through chains of views, read later through others."""

    def forward(self, x):
        a = x * 2
        piece = a[..., 1, :2]
        a[..., 0, :2] += piece * 3
        turned = a.transpose(0, 1)
        turned[0] = 7
        wider = a.unsqueeze(0)
        wider[0, :, 1].mul_(2)
        a.permute(1, 0, 2)[1].add_(1)
        return a + piece.sum(), turned, piece, wider[0]


class _Fresh(nn.Module):
    """Writes into what was just made, one of several results included."""

    def forward(self, x):
        values, index = x.topk(2, -1)
        values /= values.sum(-1, keepdim=True)
        inverse = torch.zeros_like(index)
        inverse[torch.arange(2)] = index[torch.arange(2)]
        values.clamp_(min=0.1)
        return values, inverse


class _Loop(nn.Module):
    """Each row written from those before it."""

    def forward(self, x):
        a = torch.tanh(x)
        for i in range(1, 4):
            row = a[..., i, :i].clone()
            before = a[..., :i, :i].clone()
            a[..., i, :i] = row + (row.unsqueeze(-1) * before).sum(-2)
        return a + torch.ones(5)


class _PerhapsAView(nn.Module):
    """``reshape`` may or may not share memory with what is then written to."""

    def forward(self, x):
        a = x + 1
        flat = a.reshape(-1)
        a.add_(1)
        return flat, a


class _Promoted(nn.Module):
    """In place the type stays; a new value would be promoted."""

    def forward(self, x):
        a = x.bfloat16() + 1
        a.mul_(x)
        return a


class _Input(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 2


class _OfBools(nn.Module):
    """In place a comparison keeps the type; the operation that makes a value gives bools."""

    def forward(self, x):
        a = x * 1
        a.gt_(0.05)
        return a[0] + a[1] + a[2]


class _Turned(nn.Module):
    """In place on what a tensor is, not on what it holds: its other names keep their shape."""

    def forward(self, x):
        a = x[0] * 2
        turned = a.detach()
        turned.t_()
        return a * 1, turned


class _PerhapsABuffer(nn.Module):
    """``to`` gives the buffer itself where its type is right already."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(5))

    def forward(self, x):
        count = self.count.to(x.dtype)
        count += 1
        return x + count


def _traced(model, x):
    return torch.export.export(model, (x.clone(),), strict=False)


def _run(exported, x):
    inputs = [
        exported.constants[spec.target] if spec.kind.name == "CONSTANT_TENSOR" else x.clone()
        for spec in exported.graph_signature.input_specs
    ]
    return pytree.tree_leaves(torch.fx.Interpreter(exported.graph_module).run(*inputs))


@pytest.mark.parametrize("model", [_Views(), _Fresh(), _Loop()], ids=lambda m: type(m).__name__)
def test_writes_become_values(model):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    exported = _traced(model, x)
    assert any(_mutates(node) for node in exported.graph.nodes)
    assert functionalise(exported.graph)
    exported.graph.lint()
    assert not any(_mutates(node) for node in exported.graph.nodes)
    wanted = pytree.tree_leaves(model(x.clone()))
    for got, want in zip(_run(exported, x), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "model",
    [_PerhapsAView(), _Promoted(), _Input(), _OfBools(), _Turned(), _PerhapsABuffer()],
    ids=lambda m: type(m).__name__,
)
def test_what_is_not_plain_is_left_as_it_is(model):
    exported = _traced(model, torch.randn(3, 4, 5))
    before = str(exported.graph)
    assert not functionalise(exported.graph)
    assert str(exported.graph) == before


def _mutates(node):
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
