"""Every propagation rule against the operation itself: random dimensions, ranks and uneven, interleaved divisions.

An operation is traced once. Then its operands are divided in many ways, the prover propagates, all ranks run in
lockstep, and the
gathered result must equal the operation on whole operands; also at other sizes of the free dimensions. What a rule
cannot prove is
gathered, which is right as well, so cases that must *stay divided* say so.
"""

# ruff: noqa: E501  one case a line
from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tensor_parallel.planner import export, simulate
from tensor_parallel.planner.placement import Partial, Sharded
from tensor_parallel.planner.program import PerRank
from tensor_parallel.planner.prover import Prover
from tensor_parallel.planner.tensors import Tensors
from tensor_parallel.planner.traced import Traced, collect

TRIES = 8


class Function(nn.Module):
    def __init__(self, fn: Callable[..., Any], count: int) -> None:
        super().__init__()
        self.fn = fn
        names = [f"x{i}" for i in range(count)]
        scope: dict[str, Any] = {"fn": fn}
        exec(f"def forward(self, {', '.join(names)}): return fn({', '.join(names)})", scope)
        self.forward = scope["forward"].__get__(self)


class DividedInputs(Prover):
    """A prover whose inputs arrive divided, or as pending sums."""

    def __init__(self, traced: Traced, ranks: int, places: dict[int, Any]) -> None:
        super().__init__(traced, Tensors(nn.Module()), ranks, {})
        self.places = places

    def begin(self) -> None:
        super().begin()
        for index, node in enumerate(self.traced.inputs):
            place = self.places.get(index)
            if place is None or node is None:
                continue
            value = self.env[node]
            value.place = place(value.shapes) if callable(place) else place


def divided(dim: int, owner: list[int]) -> Sharded:
    return Sharded(dim, (np.asarray(owner, dtype=np.int64),) * 2, frozenset({"x"}))


def random_owner(rng: random.Random, size: int, ranks: int) -> list[int]:
    """Contiguous, blocked or scattered; every rank holds something where it can."""
    kind = rng.choice(["even", "uneven", "blocks", "scattered"])
    if kind == "even":
        return [min(i * ranks // size, ranks - 1) for i in range(size)]
    if kind == "uneven":
        cuts = sorted(rng.sample(range(1, size), ranks - 1))
        return [sum(i >= c for c in cuts) for i in range(size)]
    if kind == "blocks":
        half = size // 2
        one = [min(i * ranks // max(half, 1), ranks - 1) for i in range(half)]
        both = (one + one + [ranks - 1] * size)[:size]
        return both if set(both) == set(range(ranks)) else random_owner(rng, size, ranks)
    owner = list(range(ranks)) + [rng.randrange(ranks) for _ in range(size - ranks)]
    rng.shuffle(owner)
    return owner


def local_inputs(values: list[Any], places: dict[int, Any], ranks: int) -> list[list[Any]]:
    per_rank: list[list[Any]] = [list(values) for _ in range(ranks)]
    for index, place in places.items():
        whole = values[index]
        if isinstance(place, Sharded):
            owner = torch.from_numpy(place.owners[0])
            for rank in range(ranks):
                per_rank[rank][index] = whole.index_select(place.dim, (owner == rank).nonzero().flatten())
        else:
            parts = [torch.randn_like(whole) for _ in range(ranks - 1)]
            parts.append(whole - sum(parts))
            for rank in range(ranks):
                per_rank[rank][index] = parts[rank]
    return per_rank


def run(prover: Prover, per_rank: list[list[Any]]) -> list[list[Any]]:
    program = prover.program
    constants = {name: prover.traced.constants[name][1] for name in program.constants}
    values = simulate.start(program, [PerRank] * len(program.inputs), lambda name, rank: None, constants)
    for position, number in enumerate(program.inputs):
        values[number] = [inputs[position] for inputs in per_rank]
    with torch.no_grad():
        for step in program.steps:
            simulate.execute(step, values, program.ranks)
    return [
        [values[ref.id][rank] if hasattr(ref, "id") else ref for ref in program.outputs]
        for rank in range(program.ranks)
    ]


def equal(got: Any, want: Any) -> None:
    if isinstance(want, Tensor):
        if want.dtype.is_floating_point:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, want)


def gathers(prover: Prover) -> int:
    return sum(1 for c in prover.communications() if c.kind == "all_gather" and c.where != "output")


def check(
    fn: Callable[..., Any],
    inputs: list[Any],
    sharded: dict[int, int],
    *,
    stays: bool,
    seed: int,
    sums: tuple[int, ...] = (),
) -> int:
    """Divide ``inputs[i]`` along ``sharded[i]`` (all alike) in many ways; the number of ways that needed no gather."""
    module = Function(fn, len(inputs))
    # The batch stays free where all operands share it; what is divided is a dimension of the model.
    batched = all(x.shape[0] == 3 for x in inputs) and 0 not in sharded.values()
    traced = collect(export._export(module, tuple(inputs), {}, "batch" if batched else "none"), tuple(inputs), {})
    rng = random.Random(seed)
    kept = 0
    for _ in range(TRIES):
        ranks = rng.choice([2, 3, 4])
        sizes = {inputs[i].shape[d] for i, d in sharded.items()}
        if any(size < ranks for size in sizes):
            ranks = 2
        owner = random_owner(rng, max(sizes), ranks) if sizes else []
        places: dict[int, Any] = {i: divided(d, owner) for i, d in sharded.items() if inputs[i].shape[d] == max(sizes)}
        places |= {i: Partial() for i in sums}
        prover = DividedInputs(traced, ranks, places)
        prover.assignments = len(traced.assignments)
        for place in places.values():
            if isinstance(place, Sharded):
                object.__setattr__(place, "owners", place.owners[:1] * prover.assignments)
        prover.run()
        want = torch.utils._pytree.tree_leaves(fn(*inputs))
        for outputs in run(prover, local_inputs(inputs, places, ranks)):
            for got, expected in zip(outputs, want, strict=True):
                equal(got, expected)
        kept += gathers(prover) == 0
        if stays:
            assert gathers(prover) == 0, [r.why for r in prover.reasons]
    return kept


X = torch.randn(3, 5, 8, 12)
Y = torch.randn(3, 5, 8, 12)
IDS = torch.tensor([2, 0, 1, 2])

STAYS: dict[str, tuple[Callable[..., Any], list[Any], dict[int, int]]] = {
    "relu": (torch.relu, [X], {0: 2}),
    "add": (lambda a, b: a + b, [X, Y], {0: 2, 1: 2}),
    "add whole": (lambda a, b: a + b, [X, Y], {0: 3}),
    "add broadcast": (lambda a, b: a * b, [X, Y[0, 0, 0]], {0: 3}),
    "mul column": (lambda a, b: a * b, [X, Y[..., :1]], {0: 2}),
    "where": (lambda a, b: torch.where(a > 0, a, b), [X, Y], {0: 3, 1: 3}),
    "clamp": (lambda a: a.clamp(-1, 1), [X], {0: 2}),
    "transpose": (lambda a: a.transpose(1, 3), [X], {0: 3}),
    "permute": (lambda a: a.permute(3, 1, 0, 2), [X], {0: 2}),
    "unsqueeze": (lambda a: a.unsqueeze(-2), [X], {0: 3}),
    "squeeze": (lambda a: a.unsqueeze(1).squeeze(1), [X], {0: 2}),
    "select": (lambda a: a[:, :, 3], [X], {0: 3}),
    "slice elsewhere": (lambda a: a[..., 2:7], [X], {0: 2}),
    "split elsewhere": (lambda a: a.split([5, 7], -1), [X], {0: 2}),
    "chunk elsewhere": (lambda a: a.chunk(3, -1), [X], {0: 2}),
    "unbind elsewhere": (lambda a: a.unbind(2), [X], {0: 3}),
    "cat elsewhere": (lambda a, b: torch.cat([a, b], 2), [X, Y], {0: 3, 1: 3}),
    "cat with whole": (lambda a, b: torch.cat([a, b], 2), [X, Y], {0: 3}),
    "cat with an empty vector": (lambda a, b: torch.cat([torch.zeros(0), a, b], -2), [X, Y], {0: 3, 1: 3}),
    "cat along with an empty vector": (lambda a: torch.cat([torch.zeros(0), a], -1), [X], {0: 3}),
    "cat along": (lambda a, b: torch.cat([a, b], 3), [X, Y], {0: 3, 1: 3}),
    "stack": (lambda a, b: torch.stack([a, b], 1), [X, Y], {0: 2, 1: 2}),
    "stack behind": (lambda a, b: torch.stack([a, b], -1), [X, Y], {0: 2, 1: 2}),
    "slice written": (lambda a, b: torch.slice_scatter(a, b, 1, 1, 4), [X, Y[:, :3]], {0: 2, 1: 2}),
    "slice written into whole": (lambda a, b: torch.slice_scatter(torch.zeros_like(a), b, 1, 1, 4), [X, Y[:, :3]], {1: 2}),
    "index written": (lambda a, b: torch.select_scatter(a, b, 1, 2), [X, Y[:, 0]], {0: 2}),
    "index written behind": (lambda a, b: torch.select_scatter(a, b, 3, 2), [X, Y[..., 0]], {0: 2, 1: 2}),
    "index written into whole": (lambda a, b: torch.select_scatter(a, b, 1, 2), [X, Y[:, 0]], {1: 2}),
    "reshape as": (lambda a, b: a.transpose(1, 2).contiguous().reshape_as(b), [X, torch.randn(3, 4, 2, 5, 12)], {0: 3}),
    "view as": (lambda a, b: a.view_as(b), [X, torch.randn(3, 40, 12)], {0: 3}),
    "whole, as a divided one": (lambda a, b: a.flatten(2).reshape_as(b) + b, [X, Y], {1: 3}),
    "whole, viewed as a divided one": (lambda a, b: a.flatten(2).view_as(b), [X, Y], {1: 2}),
    "flip elsewhere": (lambda a: a.flip(3), [X], {0: 2}),
    "roll elsewhere": (lambda a: a.roll(2, 3), [X], {0: 2}),
    "pad elsewhere": (lambda a: functional.pad(a, (1, 2)), [X], {0: 2}),
    "expand": (lambda a: a.unsqueeze(1).expand(3, 4, 5, 8, 12), [X], {0: 2}),
    "expand as": (lambda a, b: a.expand_as(b), [X[:, :1], Y], {0: 2}),
    "expand as, both divided": (lambda a, b: a.expand_as(b), [X[:, :1], Y], {0: 2, 1: 2}),
    "expand as, repeated where divided": (lambda a, b: a.expand_as(b), [X[:, :1, :1], Y], {1: 2}),
    "expand as, fewer dimensions": (lambda a, b: a.expand_as(b), [X[0, 0, 0], Y], {1: 1}),
    "expand as, whole where divided": (lambda a, b: a.expand_as(b), [X[:, :1], Y], {1: 3}),
    "expand as, heads in the batch": (lambda a: functional.normalize(a.transpose(1, 2).reshape(24, 5, 12), dim=-1), [X], {0: 2}),
    "expand as, same shape": (lambda a, b: a.expand_as(b), [X, Y], {1: 2}),
    "repeat": (lambda a: a.repeat(1, 1, 2, 1), [X], {0: 3}),
    "repeat along": (lambda a: a.repeat(1, 1, 2, 1), [X], {0: 2}),
    "repeat_interleave": (lambda a: a.repeat_interleave(3, 2), [X], {0: 2}),
    "flatten": (lambda a: a.flatten(0, 1), [X], {0: 2}),
    "merge heads": (lambda a: a.reshape(3, 5, 96), [X], {0: 2}),
    "batch and heads": (lambda a: a.transpose(1, 2).reshape(24, 5, 12), [X], {0: 2}),
    "sum elsewhere": (lambda a: a.sum(1), [X], {0: 2}),
    "sum over": (lambda a: a.sum(2), [X], {0: 2}),
    "mean over": (lambda a: a.mean((2, 3)), [X], {0: 2}),
    "mean over, kept": (lambda a: a.mean(-1, keepdim=True), [X], {0: 3}),
    "amax elsewhere": (lambda a: a.amax(1), [X], {0: 3}),
    "var elsewhere": (lambda a: a.var(1), [X], {0: 3}),
    "softmax elsewhere": (lambda a: a.softmax(-1), [X], {0: 2}),
    "cumsum elsewhere": (lambda a: a.cumsum(1), [X], {0: 2}),
    "topk elsewhere": (lambda a: a.topk(2, -1), [X], {0: 2}),
    "sort elsewhere": (lambda a: a.sort(1), [X], {0: 2}),
    "vector norm over": (lambda a: torch.linalg.vector_norm(a, dim=-1), [X], {0: 3}),
    "layer norm elsewhere": (lambda a: functional.layer_norm(a, (12,)), [X], {0: 2}),
    "layer norm over": (lambda a, w, b: functional.layer_norm(a, (12,), w, b), [X, Y[0, 0, 0], Y[1, 0, 0]], {0: 3}),
    "rms norm over": (lambda a, w: functional.rms_norm(a, (12,), w), [X, Y[0, 0, 0]], {0: 3}),
    "batch norm": (lambda a, m, v: functional.batch_norm(a, m, v.abs()), [X[0], Y[0, 0, :, 0], Y[1, 0, :, 0]], {0: 1}),
    "group norm of one": (lambda a: functional.group_norm(a, 1), [X], {0: 1}),
    "linear in": (lambda a, w: functional.linear(a, w), [X, Y[0, 0]], {0: 3, 1: 1}),
    "linear out": (lambda a, w, b: functional.linear(a, w, b), [X, torch.randn(8, 12), torch.randn(8)], {1: 0}),
    "linear in with bias": (lambda a, w, b: functional.linear(a, w, b), [X, torch.randn(7, 12), torch.randn(7)], {0: 3}),
    "matmul heads": (lambda a, b: a @ b.transpose(-1, -2), [X, Y], {0: 1, 1: 1}),
    "matmul rows": (lambda a, b: a @ b, [X, torch.randn(12, 6)], {0: 2}),
    "matmul contracted": (lambda a, b: a @ b, [X, torch.randn(12, 6)], {0: 3, 1: 0}),
    "matmul columns": (lambda a, b: a @ b, [X, torch.randn(12, 6)], {1: 1}),
    "matmul broadcast batch": (lambda a, b: a @ b, [X, torch.randn(1, 5, 12, 6)], {0: 1}),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), [torch.randn(6), X[0, 0], torch.randn(12, 6)], {2: 1}),
    "addmm contracted": (lambda b, x, w: torch.addmm(b, x, w), [torch.randn(6), X[0, 0], torch.randn(12, 6)], {1: 1, 2: 0}),
    "baddbmm": (lambda b, x, y: torch.baddbmm(b, x, y, beta=0.5), [torch.randn(5, 8, 8), X[0], Y[0].transpose(1, 2)], {1: 0, 2: 0}),
    "einsum": (lambda a, w: torch.einsum("bshd,hde->bse", a, w), [X, torch.randn(8, 12, 6)], {0: 2}),
    "einsum kept": (lambda a, w: torch.einsum("bshd,hde->bshe", a, w), [X, torch.randn(8, 12, 6)], {0: 2}),
    "conv out": (lambda x, w, b: functional.conv2d(x, w, b, padding=1), [X, torch.randn(6, 5, 3, 3), torch.randn(6)], {1: 0}),
    "conv in": (lambda x, w, b: functional.conv2d(x, w, b, padding=1), [X, torch.randn(6, 5, 3, 3), torch.randn(6)], {0: 1}),
    "depthwise": (lambda x, w, b: functional.conv2d(x, w, b, groups=5), [X, torch.randn(5, 1, 3, 3), torch.randn(5)], {0: 1}),
    "conv transposed": (lambda x, w: functional.conv_transpose2d(x, w), [X, torch.randn(5, 6, 3, 3)], {0: 1}),
    "pool": (lambda x: functional.max_pool2d(x, 2), [X], {0: 1}),
    "adaptive pool": (lambda x: functional.adaptive_avg_pool2d(x, 2), [X], {0: 1}),
    "interpolate": (lambda x: functional.interpolate(x, scale_factor=2.0), [X], {0: 1}),
    "embedding rows": (lambda w, i: functional.embedding(i, w), [torch.randn(9, 4), IDS], {0: 0}),
    "embedding columns": (lambda w, i: functional.embedding(i, w), [torch.randn(9, 8), IDS], {0: 1}),
    "rows by index": (lambda w, i: w[i - 2], [torch.randn(9, 4), IDS], {0: 0}),
    "rows by indices of rank 2": (lambda w, i: w[torch.stack([i, i + 5])], [torch.randn(9, 4), IDS], {0: 0}),
    "rows by index_select": (lambda w, i: w.index_select(0, i), [torch.randn(9, 4), IDS], {0: 0}),
    "index": (lambda a, i: a[:, i % 5], [X, IDS], {0: 2}),
    "index apart": (lambda a, i: a[i % 3, :, i], [X, IDS], {0: 3}),
    "index_select": (lambda a, i: a.index_select(1, i), [X, IDS], {0: 3}),
    "gather": (lambda a, i: a.gather(3, i), [X, torch.randint(0, 12, (3, 5, 8, 4))], {0: 2}),
    "index_add": (lambda a, i, s: a.index_add(1, i, s), [X, IDS, torch.randn(3, 4, 8, 12)], {0: 3, 2: 3}),
    "attention": (functional.scaled_dot_product_attention, [X, Y, Y * 2], {0: 1, 1: 1, 2: 1}),
    "attention, keys whole": (functional.scaled_dot_product_attention, [X, Y, Y * 2], {0: 1}),
    "attention, masked": (
        lambda q, k, v, m: functional.scaled_dot_product_attention(q, k, v, m), [X, Y, Y, torch.randn(3, 1, 8, 8)], {0: 1, 1: 1, 2: 1}
    ),
    "attention, biased by head": (
        lambda q, k, v, m: functional.scaled_dot_product_attention(q, k, v, m), [X, Y, Y, torch.randn(1, 5, 8, 8)], {0: 1, 1: 1, 2: 1}
    ),
    "attention, one key head": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), [X, Y[:, :1], Y[:, 1:2]], {0: 1}
    ),
}  # fmt: skip

MAY_GATHER: dict[str, tuple[Callable[..., Any], list[Any], dict[int, int]]] = {
    "roll along": (lambda a: a.roll(3, 2), [X], {0: 2}),
    "flip along": (lambda a: a.flip(2), [X], {0: 2}),
    "pad along": (lambda a: functional.pad(a, (0, 0, 1, 2)), [X], {0: 2}),
    "slice along": (lambda a: a[:, :, 2:7], [X], {0: 2}),
    "strided slice": (lambda a: a[:, :, ::2], [X], {0: 2}),
    "slice from the end": (lambda a: a[..., -7:], [X], {0: 3}),
    "split along": (lambda a: a.split([5, 7], -1), [X], {0: 3}),
    "chunk along": (lambda a: a.chunk(2, 2), [X], {0: 2}),
    "constant index along": (lambda a: a[:, :, [0, 3, 5, 6, 7, -7, 2, 4]], [X], {0: 2}),
    "slice written along": (lambda a, b: torch.slice_scatter(a, b, 2, 1, 4), [X, Y[:, :, :3]], {0: 2}),
    "index written along": (lambda a, b: torch.select_scatter(a, b, 2, 1), [X, Y[:, :, 0]], {0: 2}),
    "all written along": (lambda a, b: torch.slice_scatter(a, b, 2, 0, 8), [X, Y], {0: 2}),
    "unbind along": (lambda a: a.unbind(2), [X], {0: 2}),
    "split heads": (lambda a: a.view(3, 5, 8, 3, 4), [X], {0: 3}),
    "split fused heads": (lambda a: a.view(3, 5, 8, 3, 2, 2).unbind(3), [X], {0: 3}),
    "merge": (lambda a: a.reshape(3, 5, 96), [X], {0: 3}),
    "interleave": (lambda a: a.transpose(2, 3).reshape(3, 5, 96), [X], {0: 2}),
    "regroup": (lambda a: a.reshape(3, 5, 12, 8), [X], {0: 2}),
    "softmax along": (lambda a: a.softmax(2), [X], {0: 2}),
    "topk along": (lambda a: a.topk(3, 2), [X], {0: 2}),
    "cumsum along": (lambda a: a.cumsum(2), [X], {0: 2}),
    "amax along": (lambda a: a.amax(2), [X], {0: 2}),
    "var along": (lambda a: a.var(2), [X], {0: 2}),
    "norm of order 3": (lambda a: torch.linalg.vector_norm(a, 3, -1), [X], {0: 3}),
    "different dims": (lambda a, b: a + b.transpose(2, 3).reshape(3, 5, 8, 12), [X, Y.reshape(3, 5, 12, 8)], {0: 2}),
    "attention along length": (functional.scaled_dot_product_attention, [X, Y, Y], {0: 2}),
    "attention along features": (functional.scaled_dot_product_attention, [X, Y, Y], {0: 3, 1: 3}),
    "group norm": (lambda a: functional.group_norm(a, 4), [X.transpose(1, 2).contiguous()], {0: 1}),
    "grouped conv": (
        lambda x, w: functional.conv2d(x, w, groups=4), [X.transpose(1, 2).contiguous(), torch.randn(12, 2, 3, 3)], {0: 1}
    ),
    "conv along space": (lambda x, w: functional.conv2d(x, w), [X, torch.randn(6, 5, 3, 3)], {0: 2}),
    "index along": (lambda a, i: a[:, :, i], [X, IDS], {0: 2}),
    "gather along": (lambda a, i: a.gather(2, i), [X, torch.randint(0, 8, (3, 5, 8, 12))], {0: 2}),
    "no rule": (lambda a: torch.linalg.det(a[..., :8]), [X], {0: 2}),
    "grouped queries": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [torch.randn(2, 8, 5, 4), torch.randn(2, 4, 5, 4), torch.randn(2, 4, 5, 4)], {0: 1}
    ),
}  # fmt: skip

SUMS: dict[str, tuple[Callable[..., Any], list[Any], tuple[int, ...]]] = {
    "reshape": (lambda a: a.reshape(15, 96), [X], (0,)),
    "transpose": (lambda a: a.transpose(1, 2), [X], (0,)),
    "slice": (lambda a: a[:, 0], [X], (0,)),
    "split": (lambda a: a.split(4, -1), [X], (0,)),
    "scale": (lambda a: a * 0.5, [X], (0,)),
    "scale by whole": (lambda a, b: a * b, [X, Y[..., :1]], (0,)),
    "divide": (lambda a, b: a / (b.abs() + 1), [X, Y], (0,)),
    "divide by": (lambda a, b: b / (a + 10), [X, Y], (0,)),
    "add": (lambda a, b: a + b, [X, Y], (0, 1)),
    "add whole": (lambda a, b: a + b, [X, Y], (0,)),
    "add to whole": (lambda a, b: b + a, [X, Y], (0,)),
    "add scaled": (lambda a, b: torch.add(a, b, alpha=3), [X, Y], (0,)),
    "add constant": (lambda a: a + 1.0, [X], (0,)),
    "subtract whole": (lambda a, b: a - b, [X, Y], (0,)),
    "subtract from whole": (lambda a, b: b - a, [X, Y], (0,)),
    "square": (lambda a: a * a, [X], (0,)),
    "mean": (lambda a: a.mean(-1), [X], (0,)),
    "mask": (lambda a, b: a.masked_fill(b > 0, 0.0), [X, Y], (0,)),
    "mask with one": (lambda a, b: a.masked_fill(b > 0, 1.0), [X, Y], (0,)),
    "cat": (lambda a, b: torch.cat([a, b], 1), [X, Y], (0, 1)),
    "cat with whole": (lambda a, b: torch.cat([a, b], 1), [X, Y], (0,)),
    "index rows": (lambda a, i: a[i % 3], [X, IDS], (0,)),
    "index_add": (lambda a, i, s: a.index_add(1, i, s), [X, IDS, torch.randn(3, 4, 8, 12)], (2,)),
    "index_add to sum": (lambda a, i, s: a.index_add(1, i, s), [X, IDS, torch.randn(3, 4, 8, 12)], (0, 2)),
    "narrowing matmul": (lambda a, b: a @ b, [X, torch.randn(12, 3)], (0,)),
    "widening matmul": (lambda a, b: a @ b, [X, torch.randn(12, 30)], (0,)),
    "relu": (torch.relu, [X], (0,)),
    "to float64": (lambda a: a.double() + 1, [X], (0,)),
    "pad": (lambda a: functional.pad(a, (1, 1)), [X], (0,)),
    "linear with bias": (lambda a, w, b: functional.linear(a, w, b), [X, torch.randn(3, 12), torch.randn(3)], (0,)),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays_divided_and_equals_the_operation(name: str) -> None:
    fn, inputs, sharded = STAYS[name]
    check(fn, inputs, sharded, stays=True, seed=len(name))


@pytest.mark.parametrize("name", MAY_GATHER)
def test_equals_the_operation_divided_or_not(name: str) -> None:
    fn, inputs, sharded = MAY_GATHER[name]
    check(fn, inputs, sharded, stays=False, seed=len(name))


@pytest.mark.parametrize("name", SUMS)
def test_pending_sums_equal_the_operation(name: str) -> None:
    fn, inputs, sums = SUMS[name]
    check(fn, inputs, {}, stays=True, seed=len(name), sums=sums)
