"""Dimensions in another order, movement along a dimension, repetition: no piece is cut from the divided dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import Owners, Sharded, Undecided, Unproven, pattern
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.rules.reshape import sizes_of
from tensor_parallel.planner.values import Call, Sym, Value

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------- order of dimensions
def remap(e: Engine, call: Call, mapping: Sequence[int | None], ref: Any = None, /, **replacements: Any) -> Any:
    """Result dimension ``i`` is operand dimension ``mapping[i]`` (None: a new one); the operation does not touch
    the others."""
    value = next(v for v in call.values() if e.is_sharded(v) or e.undecided(v))
    place = e.place(value)
    if isinstance(place, Undecided):
        dims = tuple(None if m is None else place.dims[m] for m in mapping)
        result = e.result(call, None, Undecided(place.param, dims, place.looked_up))
        result.weight = value.weight
        return result
    assert isinstance(place, Sharded)
    if place.dim not in mapping:
        raise Unproven("acts on the divided dimension")
    new = Sharded(mapping.index(place.dim), place.owners, place.origin)
    result = e.result(call, e.replay(call, **replacements) if ref is None else ref, new)
    result.weight = value.weight
    return result


@rule("transpose", "swapaxes", "swapdims")
def transpose(e: Engine, call: Call) -> Any:
    ndim = call.value("self").ndim
    names = [a.name for a in call.arguments][1:3]
    order: list[int | None] = list(range(ndim))
    a, b = call.dim(names[0], ndim), call.dim(names[1], ndim)
    order[a], order[b] = order[b], order[a]
    return remap(e, call, order)


@rule("t", "numpy_T", "adjoint", "mT")
def reverse(e: Engine, call: Call) -> Any:
    ndim = call.value("self").ndim
    if ndim > 2 and call.name != "numpy_T":
        return remap(e, call, [*range(ndim - 2), ndim - 1, ndim - 2])
    return remap(e, call, list(range(ndim))[::-1])


@rule("permute")
def permute(e: Engine, call: Call) -> Any:
    ndim = call.value("self").ndim
    return remap(e, call, [d % ndim for d in call["dims"]])


@rule("movedim", "moveaxis")
def movedim(e: Engine, call: Call) -> Any:
    ndim = call.value("self").ndim
    source, destination = call["source"], call["destination"]
    source, destination = ([source], [destination]) if isinstance(source, int) else (source, destination)
    order = torch.empty([1] * ndim).movedim(list(source), list(destination)).ndim  # validates the arguments
    assert order == ndim
    moved = {d % ndim: s % ndim for s, d in zip(source, destination, strict=True)}
    rest = iter(d for d in range(ndim) if d not in moved.values())
    return remap(e, call, [moved[d] if d in moved else next(rest) for d in range(ndim)])


@rule("unsqueeze")
def unsqueeze(e: Engine, call: Call) -> Any:
    ndim = call.value("self").ndim
    dim = call["dim"] % (ndim + 1)
    return remap(e, call, [*range(dim), None, *range(dim, ndim)])


@rule("squeeze")
def squeeze(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dims = call["dim"] if any(a.name == "dim" for a in call.arguments) else None
    asked = range(value.ndim) if dims is None else [d % value.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    gone = {d for d in asked if all(shape[d] == 1 for shape in value.shapes)}
    return remap(e, call, [d for d in range(value.ndim) if d not in gone])


@rule("select")
def select(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dim = call.dim("dim", value.ndim)
    return remap(e, call, [d for d in range(value.ndim) if d != dim])


@rule("unfold")
def unfold(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dim = call.dim("dimension", value.ndim)
    return remap(e, call, [*(None if d == dim else d for d in range(value.ndim)), None])


@rule("diagonal", "linalg_diagonal")
def diagonal(e: Engine, call: Call) -> Any:
    value = call.value("self")
    used = {call.dim("dim1", value.ndim), call.dim("dim2", value.ndim)}
    return remap(e, call, [*(d for d in range(value.ndim) if d not in used), None])


# --------------------------------------------------------------------------------------- along dimensions, in place
def along(e: Engine, call: Call, touched: set[int]) -> Any:
    """The operation mixes elements only along ``touched`` dimensions, which it keeps."""
    value = next(v for v in call.values() if e.is_sharded(v) or e.undecided(v))
    return remap(e, call, [None if d in touched else d for d in range(value.ndim)])


@rule("flip", "roll")
def turn(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dims = call["dims"]
    return along(e, call, {d % value.ndim for d in dims} if dims else set(range(value.ndim)))


@rule("tril", "triu")
def triangle(e: Engine, call: Call) -> Any:
    ndim = call.value("self").ndim
    return along(e, call, {ndim - 2, ndim - 1})


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(e: Engine, call: Call) -> Any:
    ndim = call.value("self").ndim
    amounts = call["pad"] if any(a.name == "pad" for a in call.arguments) else call["padding"]
    touched = {ndim - 1 - i // 2 for i, amount in enumerate(amounts) if not isinstance(amount, int) or amount != 0}
    return along(e, call, touched)


# ------------------------------------------------------------------------------------------------------ repeating
@rule("expand", "broadcast_to")
def expand(e: Engine, call: Call) -> Any:
    value = call.value("self")
    size = list(call["size"])
    offset = len(size) - value.ndim
    place = e.place(value)
    if isinstance(place, Sharded):
        size[place.dim + offset] = -1  # keeps whatever the local part has
    mapping = [None if d < offset else d - offset for d in range(len(size))]
    for d, source in enumerate(mapping):
        if source is not None and any(s[source] != o[d] for s, o in zip(value.shapes, call.shapes, strict=True)):
            mapping[d] = None
    return remap(e, call, mapping, size=size)


@rule("expand_as")
def expand_as(e: Engine, call: Call) -> Any:
    """Only the shape of ``other`` counts: a whole operand becomes a part like it where ``other`` is divided."""
    value, other = call.value("self"), call.value("other")
    if e.undecided(value) or e.undecided(other):
        for operand in (value, other):
            e.commit(operand)
        return e.visit_again(call)
    offset = other.ndim - value.ndim
    place = e.place(value)
    if isinstance(place, Sharded):
        dim = place.dim + offset
        if e.is_sharded(other, dim):
            try:
                owners = e.unify(place.owners, e.sharded(other).owners)
                return e.result(call, e.replay(call), Sharded(dim, owners, place.origin | e.sharded(other).origin))
            except Unproven:
                pass
        sizes = sizes_of(e, call)
        sizes[dim] = -1  # keeps whatever the local part has
        return e.result(call, e.emit(aten.expand.default, value, sizes), Sharded(dim, place.owners, place.origin))
    place = e.sharded(other)
    at = place.dim - offset
    repeats = at < 0 or all(shape[at] == 1 for shape in value.shapes)
    ref = e.enter(e.whole_now(value)) if repeats else e.part(value, at, place.owners)
    return e.result(call, e.emit(call.op, ref, other), Sharded(place.dim, place.owners, place.origin))


@rule("repeat")
def repeat(e: Engine, call: Call) -> Any:
    value = call.value("self")
    times = call["repeats"]
    offset = len(times) - value.ndim
    place = e.place(value)
    if isinstance(place, Sharded) and times[place.dim + offset] != 1:
        each = times[place.dim + offset]
        values = each.values if isinstance(each, Sym) else (each,) * e.assignments
        owners = tuple(np.tile(o, v) for o, v in zip(place.owners, values, strict=True))
        return _grown(e, call, value, place, place.dim + offset, owners)
    mapping = [None if d < offset or times[d] != 1 else d - offset for d in range(len(times))]
    return remap(e, call, mapping)


@rule("repeat_interleave")
def repeat_interleave(e: Engine, call: Call) -> Any:
    value = call.value("self") if any(a.name == "self" for a in call.arguments) else None
    times = call["repeats"]
    if value is None or call["dim"] is None or not isinstance(times, int):
        raise Unproven("repeats by a tensor")
    dim = call.dim("dim", value.ndim)
    place = e.place(value)
    if isinstance(place, Sharded) and place.dim == dim:
        return _grown(e, call, value, place, dim, tuple(np.repeat(o, times) for o in place.owners), output_size=None)
    return along(e, call, {dim})


def _grown(e: Engine, call: Call, value: Value, place: Sharded, dim: int, owners: Owners, **replacements: Any) -> Any:
    if not e.solving and pattern(owners) is None:
        raise Unproven("repeats a division of free size")
    return e.result(call, e.replay(call, **replacements), Sharded(dim, owners, place.origin))


__all__ = ["along", "remap"]
