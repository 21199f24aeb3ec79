"""What planned programs call beside ATen operations: collectives, and the few local operations that know their rank's
indices.

A collective is an object: ``run`` performs it on one rank through a group, ``simulate`` performs it for all ranks at
once in one
process. Everything else is an ordinary function of local tensors whose constants were chosen for the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tensor_parallel import collectives
from tensor_parallel.group import Group
from tensor_parallel.partition import split_sizes
from tensor_parallel.planner.program import Step


@dataclass(frozen=True)
class AllReduce:
    """Sum of a pending value over ranks."""

    kind = "all_reduce"

    def run(self, group: Group, value: Tensor) -> Tensor:
        return collectives.all_reduce_sum(value, group)

    def simulate(self, values: Sequence[Tensor]) -> list[Tensor]:
        if values[0].dtype == torch.bool:
            raise TypeError("a pending sum of booleans")
        total = values[0].clone()
        for value in values[1:]:
            total = total + value
        return [total] * len(values)


@dataclass(frozen=True)
class AllGather:
    """The whole of a divided dimension, in global order.

    ``counts[r]`` is how many entries of the base pattern rank ``r`` holds, ``order`` the permutation from rank
    order to global
    order (None when they agree). ``outer`` or ``inner`` is -1 when the pattern repeats a number of times known
    only at run time.
    """

    dim: int
    counts: tuple[int, ...]
    order: tuple[int, ...] | None = None
    outer: int = 1
    inner: int = 1
    kind = "all_gather"

    def run(self, group: Group, value: Tensor) -> Tensor:
        value, dim, sizes = self._open(value, group.rank)
        return self._close(collectives.all_gather_concat(value, dim, group, sizes))

    def simulate(self, values: Sequence[Tensor]) -> list[Tensor]:
        parts = [self._open(value, rank)[0] for rank, value in enumerate(values)]
        dim = self.dim + (1 if self.outer == -1 else 0)
        return [self._close(torch.cat(parts, dim))] * len(values)

    def _open(self, value: Tensor, rank: int) -> tuple[Tensor, int, list[int]]:
        mine = self.counts[rank]
        if self.outer == -1:
            return value.unflatten(self.dim, (value.shape[self.dim] // mine, mine)), self.dim + 1, list(self.counts)
        repeat = value.shape[self.dim] // mine if self.inner == -1 and mine else 1
        if self.inner == -1 and self.order is not None:
            return value.unflatten(self.dim, (mine, repeat)), self.dim, list(self.counts)
        return value, self.dim, [count * repeat for count in self.counts]

    def _close(self, whole: Tensor) -> Tensor:
        dim = self.dim + (1 if self.outer == -1 else 0)
        if self.order is not None:
            whole = whole.index_select(dim, torch.tensor(self.order, dtype=torch.long, device=whole.device))
        if self.outer == -1 or (self.inner == -1 and self.order is not None):
            whole = whole.flatten(self.dim, self.dim + 1)
        return whole


@dataclass(frozen=True)
class ReduceScatter:
    """Each rank's rows, along ``dim``, of the sum of a pending value; as evenly as the number of rows allows."""

    dim: int
    kind = "reduce_scatter"

    def run(self, group: Group, value: Tensor) -> Tensor:
        return collectives.reduce_scatter_sum(value, self.dim, group)

    def simulate(self, values: Sequence[Tensor]) -> list[Tensor]:
        total = AllReduce().simulate(values)[0]
        return list(total.split(split_sizes(total.shape[self.dim], len(values)), self.dim))


@dataclass(frozen=True)
class GatherRows:
    """The rows that :class:`ReduceScatter` or :class:`TakeRows` gave each rank, together; ``size`` of them in all.

    ``grad`` is that of :func:`collectives.all_gather_concat`.
    """

    dim: int
    grad: Literal["slice", "reduce_scatter"]
    kind = "all_gather"

    def run(self, group: Group, value: Tensor, size: int) -> Tensor:
        sizes = split_sizes(size, group.world_size)
        return collectives.all_gather_concat(value, self.dim, group, sizes, grad=self.grad)

    def simulate(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(values), self.dim)] * len(values)


@dataclass(frozen=True)
class TakeRows:
    """A rank's rows of a replicated value."""

    dim: int
    kind = "take_rows"

    def run(self, group: Group, value: Tensor) -> Tensor:
        return collectives.scatter(value, self.dim, group).clone()  # a view would keep the whole alive

    def simulate(self, values: Sequence[Tensor]) -> list[Tensor]:
        sizes = split_sizes(values[0].shape[self.dim], len(values))
        return [value.split(sizes, self.dim)[rank] for rank, value in enumerate(values)]


@dataclass(frozen=True)
class Enter:
    """A replicated value is about to be used by each rank for its own part: gradients are summed on the way back."""

    kind = "enter"

    def run(self, group: Group, value: Tensor) -> Tensor:
        return collectives.copy_to_ranks(value, group)

    def simulate(self, values: Sequence[Tensor]) -> list[Tensor]:
        return list(values)


@dataclass(frozen=True)
class Leave(Enter):
    """A shared piece of a divided value is used as a replicated one: each rank passes back its part of the gradient."""

    kind = "leave"

    def run(self, group: Group, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        scaled: Tensor = _ScaleGrad.apply(value, 1 / group.world_size, None, None)  # type: ignore[no-untyped-call]
        return scaled


@dataclass(frozen=True)
class Shared(Enter):
    """A parameter of which every rank holds some indices: their gradient, kept as parts, is made whole again.

    ``index[r]`` lists rank ``r``'s local positions of them along ``dim``.
    """

    dim: int
    index: tuple[tuple[int, ...], ...]
    kind = "shared"

    def run(self, group: Group, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        at = torch.tensor(self.index[group.rank], dtype=torch.long, device=value.device)
        whole: Tensor = _ScaleGrad.apply(value, float(group.world_size), self.dim, at)  # type: ignore[no-untyped-call]
        return whole


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float, dim: int | None, at: Tensor | None) -> Tensor:
        ctx.factor, ctx.dim, ctx.at = factor, dim, at
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.dim is None:
            return grad * ctx.factor, None, None, None
        return grad.index_copy(ctx.dim, ctx.at, grad.index_select(ctx.dim, ctx.at) * ctx.factor), None, None, None


Collective = AllReduce | AllGather | ReduceScatter | GatherRows | TakeRows | Enter


def take_range(value: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A rank's consecutive indices of a replicated value."""
    return value.narrow(dim, start, length)


def take_indices(value: Tensor, dim: int, index: tuple[int, ...]) -> Tensor:
    """A rank's indices of a replicated value."""
    return value.index_select(dim, torch.tensor(index, dtype=torch.long, device=value.device))


def take_pattern(value: Tensor, dim: int, index: tuple[int, ...], base: int, outer: int, inner: int) -> Tensor:
    """A rank's indices of a dimension that is ``outer x base x inner`` long, one of which is free."""
    if outer == -1:
        opened: Tensor = value.unflatten(dim, (value.shape[dim] // base, base))
        at = dim + 1
    else:
        opened = value.unflatten(dim, (base, value.shape[dim] // base))
        at = dim
    taken: Tensor = opened.index_select(at, torch.tensor(index, dtype=torch.long, device=value.device))
    return taken.flatten(dim, dim + 1)


def length(value: Tensor, dim: int) -> int:
    """A size, as a number."""
    return value.shape[dim]


def share(size: int, count: int, base: int) -> int:
    """A rank's part of a free size that repeats a base of ``base`` indices, ``count`` of them its own."""
    return size // base * count


def pack(values: Sequence[Tensor]) -> Tensor:
    """Several pending sums as one payload."""
    return torch.cat([value.reshape(-1) for value in values])


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a payload that :func:`pack` made of tensors ``like`` these."""
    parts = packed.split([value.numel() for value in like])
    return [part.view(value.shape) for part, value in zip(parts, like, strict=True)]


def lookup_rows(weight: Tensor, ids: Tensor, starts: tuple[tuple[int, int, int], ...], size: int) -> Tensor:
    """Rows of a table of ``size`` rows divided by rows: zeros for the rows that other ranks hold.

    ``starts`` lists this rank's runs as ``(start, stop, local offset)``. Raises ``IndexError`` for an id outside
    the whole table, as
    the undivided lookup does; zeros from every rank would hide it.
    """
    check_ids(ids, size)
    if len(starts) == 1:
        start, stop, _ = starts[0]
        local = ids - start
        outside = (local < 0) | (local >= stop - start)
    else:
        local = torch.full_like(ids, -1)
        for start, stop, offset in starts:
            local = torch.where((ids >= start) & (ids < stop), ids - start + offset, local)
        outside = local < 0
    if weight.shape[0] == 0:
        return weight.new_zeros((*ids.shape, weight.shape[1]))
    rows = functional.embedding(local.masked_fill(outside, 0), weight)
    return rows.masked_fill(outside.unsqueeze(-1), 0.0)


def from_the_front(ids: Tensor, size: int) -> Tensor:
    """Indices of which negative ones count from the end, all counted from the front."""
    return torch.where(ids < 0, ids + size, ids)


def check_ids(ids: Tensor, size: int) -> None:
    """Raise ``IndexError`` when an id lies outside ``[0, size)``; asynchronous on an accelerator."""
    if ids.device.type == "cpu":
        if ids.numel():
            low, high = torch.aminmax(ids)
            if int(low) < 0 or int(high) >= size:
                raise IndexError(f"index out of range: ids span [{int(low)}, {int(high)}], the table has {size} rows")
    elif ids.device.type == "cuda":
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"an id lies outside the {size} rows of the table")


def add_once(pending: Tensor, whole: Tensor, alpha: float, first: bool) -> Tensor:
    """Add a replicated value to a pending sum: on one rank, since the sum over ranks follows.

    The gradient reaches ``whole`` on every rank alike (the gradient of a pending sum is replicated).
    """
    if torch.is_grad_enabled() and whole.requires_grad:
        added: Tensor = _AddOnce.apply(pending, whole, alpha, first)  # type: ignore[no-untyped-call]
        return added
    return torch.add(pending, whole, alpha=alpha) if first else pending


class _AddOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, whole: Tensor, alpha: float, first: bool) -> Tensor:
        ctx.alpha = alpha
        return torch.add(pending, whole, alpha=alpha) if first else pending.view_as(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grad, grad * ctx.alpha if ctx.alpha != 1 else grad, None, None


def add_part(pending: Tensor, part: Tensor, alpha: float, index: tuple[int, ...] | range) -> Tensor:
    """Add a rank's own entries of a vector to a pending sum, in place along its last dimension: the sum over ranks
    follows.

    The gradient of a pending sum is replicated, so each rank's own slice of it is its part's.
    """
    if isinstance(index, range):
        pending.narrow(-1, index.start, len(index)).add_(part, alpha=alpha)
        return pending
    at = torch.tensor(index, dtype=torch.long, device=pending.device)
    return pending.index_add_(-1, at, part.expand(*pending.shape[:-1], -1), alpha=alpha)


def moments(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum and sum of squares over ``dims`` (kept), stacked last, in float64 so that their difference keeps its
    digits."""
    wide = value.double()
    return torch.stack([wide.sum(dims, keepdim=True), wide.square().sum(dims, keepdim=True)], -1)


def normalize(value: Tensor, sums: Tensor, count: int, eps: float) -> Tensor:
    """``(value - mean) / sqrt(variance + eps)`` from the summed moments of ``count`` elements; biased variance."""
    mean = sums.select(-1, 0) / count
    variance = (sums.select(-1, 1) / count - mean.square()).clamp_min(0)
    scale = torch.rsqrt(variance + eps)
    wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return ((wide - mean.to(wide.dtype)) * scale.to(wide.dtype)).to(value.dtype)


def with_rank_seed(op: Any, rank: int, *args: Any, **kwargs: Any) -> Any:
    """Run a random operation on a rank's own part: different numbers on each rank, the shared generator advanced
    alike on all.

    The numbers are a function of the shared generator's state, so recomputation under ``torch.utils.checkpoint``
    repeats them.
    """
    seed = int(torch.randint(2**62, ()).item())
    device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed + 0x9E3779B9 * (rank + 1)) % 2**63)
        return op(*args, **kwargs)


def dropout(value: Tensor, p: float, train: bool | None) -> Tensor:
    """``aten.native_dropout`` without its mask, which only the backward needs."""
    dropped: Tensor = torch.ops.aten.native_dropout.default(value, p, train)[0]
    return dropped


def is_random(step: Step) -> bool:
    """Whether a step draws from the generator that all ranks advance alike."""
    if step.fn in (with_rank_seed, dropout):
        return True
    op: Any = step.fn
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    names = [argument.name for argument in op._schema.arguments]
    if "dropout_p" not in names:
        return True
    at = names.index("dropout_p")
    return bool(step.args[at] if at < len(step.args) else step.kwargs.get("dropout_p", 0.0))


def normalize_rms(value: Tensor, sums: Tensor, count: int, eps: float) -> Tensor:
    """``value / sqrt(mean square + eps)`` from the summed moments of ``count`` elements."""
    scale = torch.rsqrt(sums.select(-1, 1) / count + eps)
    wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return (wide * scale.to(wide.dtype)).to(value.dtype)


def group_size(value: Tensor, channels: int) -> int:
    """Elements per sample of a whole image of which ``value`` holds some channels."""
    return channels * value[0, 0].numel()


def per_channel(vector: Tensor, ndim: int) -> Tensor:
    """A vector over channels, shaped to broadcast against ``(batch, channels, ...)`` of ``ndim`` dimensions."""
    return vector.view(-1, *[1] * (ndim - 2))


def select_heads(value: Tensor, dim: int, index: tuple[int, ...]) -> Tensor:
    """For each local query head its key or value head, out of all of them."""
    if len(index) > 1 and all(b - a == 1 for a, b in pairwise(index)):
        return value.narrow(dim, index[0], len(index))
    return value.index_select(dim, torch.tensor(index, dtype=torch.long, device=value.device))
