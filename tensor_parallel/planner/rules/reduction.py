"""Sums, means and other reductions; operations that work within one dimension (softmax, sort, cumulative sums)."""

from __future__ import annotations

import math
from typing import Any

import torch

from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import Partial, Replicated, Sharded, Unproven, counts, pattern
from tensor_parallel.planner.program import PerRank
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.values import Call, Value

aten = torch.ops.aten


def reduced_dims(call: Call, ndim: int) -> set[int]:
    """The dimensions a reduction removes (or keeps as 1)."""
    for name in ("dim", "dims", "axis"):
        if any(a.name == name for a in call.arguments):
            dims = call[name]
            if dims is None or dims == []:
                return set(range(ndim))
            return {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    return set(range(ndim))


def _after(place: Sharded, dims: set[int], keepdim: bool) -> Sharded:
    dim = place.dim if keepdim else place.dim - sum(1 for d in dims if d < place.dim)
    return Sharded(dim, place.owners, place.origin)


def _keepdim(call: Call) -> bool:
    return bool(call["keepdim"]) if any(a.name == "keepdim" for a in call.arguments) else False


def _passes(e: Engine, call: Call, value: Value, dims: set[int]) -> Any:
    """The reduction leaves the divided dimension alone."""
    place = _after(e.sharded(value), dims, _keepdim(call))
    ref = e.replay(call)
    if isinstance(call.shapes, list):
        return [e.result(call, e.item(ref, i), place, i) for i in range(len(call.shapes))]
    return e.result(call, ref, place)


def _operand(e: Engine, call: Call) -> Value:
    value = call.value(call.arguments[0].name)
    if not e.is_sharded(value):
        raise Unproven("the reduced operand is not the divided one")
    return value


@rule("sum")
def total(e: Engine, call: Call) -> Any:
    value = _operand(e, call)
    dims = reduced_dims(call, value.ndim)
    if e.sharded(value).dim not in dims:
        return _passes(e, call, value, dims)
    if e.share(e.sharded(value).owners):
        return e.visit_again(call)  # a small piece of a weight, rather than a sum over ranks
    e.exclusive(e.sharded(value).owners)
    return e.result(call, e.replay(call), Partial(e.sharded(value).origin))


@rule("mean")
def mean(e: Engine, call: Call) -> Any:
    value = _operand(e, call)
    dims = reduced_dims(call, value.ndim)
    place = e.sharded(value)
    if place.dim not in dims:
        return _passes(e, call, value, dims)
    ref = None
    e.exclusive(place.owners)
    if not e.solving:
        shares = _shares(e, place)
        ref = e.emit(torch.mul, e.replay(call), PerRank(shares))
    return e.result(call, ref, Partial(place.origin))


def _shares(e: Engine, place: Sharded) -> tuple[float, ...]:
    """The share of the divided dimension that each rank holds, at any size."""
    described = pattern(place.owners)
    if described is None:
        raise Unproven("a division that no pattern describes")
    return tuple(c / len(described.base) for c in counts(described.base, e.ranks))


@rule("linalg_vector_norm")
def vector_norm(e: Engine, call: Call) -> Any:
    value = _operand(e, call)
    dims = reduced_dims(call, value.ndim)
    if e.sharded(value).dim not in dims:
        return _passes(e, call, value, dims)
    order = call["ord"]
    if order not in (1, 2, 1.0, 2.0) or call["dtype"] is not None:
        raise Unproven("a norm other than 1 or 2")
    e.exclusive(e.sharded(value).owners)
    inner = e.emit(torch.abs if order == 1 else torch.square, value)
    summed = e.result(
        call, e.emit(aten.sum.dim_IntList, inner, sorted(dims), _keepdim(call)), Partial(e.sharded(value).origin)
    )
    whole = e.full(summed, "")
    return e.result(call, e.emit(torch.sqrt, whole) if order == 2 else whole.ref, Replicated())


@rule("norm")
def norm(e: Engine, call: Call) -> Any:
    value = _operand(e, call)
    if not any(a.name == "dim" for a in call.arguments) or call["dim"] is None:
        raise Unproven("a norm over everything")
    dims = reduced_dims(call, value.ndim)
    if e.sharded(value).dim in dims:
        raise Unproven("a norm over the divided dimension")
    return _passes(e, call, value, dims)


@rule("amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "any", "all", "argmax", "argmin", "logsumexp",
      "nansum",
      "median", "mode", "count_nonzero")  # fmt: skip
def reduce(e: Engine, call: Call) -> Any:
    value = _operand(e, call)
    dims = reduced_dims(call, value.ndim)
    if e.sharded(value).dim in dims:
        raise Unproven("reduces the divided dimension")
    return _passes(e, call, value, dims)


@rule("max", "min")
def extreme(e: Engine, call: Call) -> Any:
    """``max(x)``, ``max(x, dim)`` or the elementwise ``max(x, y)``."""
    from tensor_parallel.planner.rules.pointwise import elementwise

    if any(a.name == "other" for a in call.arguments):
        return elementwise(e, call)
    return reduce(e, call)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax",
      "cummin", "logcumsumexp",
      "sort", "argsort", "topk", "kthvalue", "glu", "renorm")  # fmt: skip
def within_dim(e: Engine, call: Call) -> Any:
    """Works along one dimension and keeps the others apart."""
    value = _operand(e, call)
    place = e.sharded(value)
    if call.dim("dim", value.ndim) == place.dim:
        raise Unproven("works along the divided dimension")
    ref = e.replay(call)
    kept = Sharded(place.dim, place.owners, place.origin)
    if isinstance(call.shapes, list):
        return [e.result(call, e.item(ref, i), kept, i) for i in range(len(call.shapes))]
    return e.result(call, ref, kept)


def product(sizes: tuple[int, ...]) -> int:
    return math.prod(sizes)
