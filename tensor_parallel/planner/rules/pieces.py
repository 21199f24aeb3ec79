"""Cutting pieces from a divided dimension, writing them back, and joining pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import Owners, Sharded, Undecided, Unproven, counts, pattern, positions
from tensor_parallel.planner.program import PerRank
from tensor_parallel.planner.rules.movement import along
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.values import Call, Sym, Value

aten = torch.ops.aten


@rule("slice", "narrow")
def slice_(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dim = call.dim("dim", value.ndim)
    if call.name == "narrow":
        raise Unproven("narrow of a divided value")
    if call.shapes == value.shapes:
        return along(e, call, set())
    place = e.place(value)
    if isinstance(place, Undecided) and place.dims[dim] is not None:
        if place.looked_up or not e.settle_for_pieces(value, dim):
            return along(e, call, {dim})
        return e.visit_again(call)
    if not isinstance(place, Sharded) or place.dim != dim:
        return along(e, call, {dim})
    start, end, step = (
        _constant(e, call[name], default) for name, default in (("start", 0), ("end", None), ("step", 1))
    )
    owners = tuple(o[start:end:step] for o in place.owners)
    balanced(e, owners)
    e.cut(owners)
    if e.solving:
        return e.result(call, None, Sharded(dim, owners, place.origin))
    if any(not np.array_equal(o, owners[0]) for o in owners):
        raise Unproven("a slice of a free size")
    return e.result(
        call, _local_slice(e, value, dim, place.owners[0], slice(start, end, step)), Sharded(dim, owners, place.origin)
    )


def _local_slice(e: Engine, value: Value, dim: int, owner: np.ndarray, bounds: slice) -> Any:
    """A slice of the divided dimension, on each rank's own indices: a slice again where they lie regularly."""
    chosen = np.zeros(len(owner), dtype=bool)
    chosen[bounds] = True
    local = [np.flatnonzero(chosen[positions(owner, rank)]) for rank in range(e.ranks)]
    if all((np.diff(index) == bounds.step).all() for index in local):
        starts, stops = PerRank(tuple(int(i[0]) for i in local)), PerRank(tuple(int(i[-1]) + 1 for i in local))
        return e.emit(aten.slice.Tensor, value, dim, starts, stops, bounds.step)
    return e.emit(runtime.take_indices, value, dim, PerRank(tuple(tuple(i.tolist()) for i in local)))


def _constant(e: Engine, value: Any, default: Any) -> Any:
    if value is None:
        return default
    if isinstance(value, Sym):
        raise Unproven("a slice bound that is not a constant")
    return value


def balanced(e: Engine, owners: Owners) -> None:
    for owner in owners:
        if not e.every_rank(owner) and not e.share(owners):
            raise Unproven("a piece would lie on some ranks only")


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def split(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dim = call.dim("dim", value.ndim)
    place = e.place(value)
    open_dim = isinstance(place, Undecided) and place.dims[dim] is not None and not place.looked_up
    if open_dim and e.settle_for_pieces(value, dim):
        return e.visit_again(call)
    if isinstance(place, Sharded) and place.dim == dim:
        return _split_divided(e, call, value, place, dim)
    ref = e.replay(call) if isinstance(place, Sharded) else None
    if isinstance(place, Undecided):
        dims = tuple(None if d == dim else p for d, p in enumerate(place.dims))
        place = Undecided(place.param, dims, place.looked_up)
    results = [e.result(call, e.item(ref, i), place, i) for i in range(len(call.shapes))]
    for result in results:
        result.weight = value.weight
    return results


def _split_divided(e: Engine, call: Call, value: Value, place: Sharded, dim: int) -> Any:
    pieces: list[Owners] = []
    at = [0] * e.assignments
    for shape in call.shapes:
        pieces.append(tuple(o[at[k] : at[k] + shape[k][dim]] for k, o in enumerate(place.owners)))
        at = [a + shape[k][dim] for k, a in enumerate(at)]
    for piece in pieces:
        balanced(e, piece)
    for piece in pieces:
        e.cut(piece)
    if e.solving:
        ref = None
    else:
        if any(not np.array_equal(o, piece[0]) for piece in pieces for o in piece):
            raise Unproven("pieces of a free size")
        local = [counts(piece[0], e.ranks) for piece in pieces]
        sizes = PerRank(tuple([c[r] for c in local] for r in range(e.ranks)))
        ref = e.emit(aten.split_with_sizes.default, value, sizes, dim)
    return [e.result(call, e.item(ref, i), Sharded(dim, piece, place.origin), i) for i, piece in enumerate(pieces)]


@rule("unbind")
def unbind(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dim = call.dim("dim", value.ndim)
    place = e.place(value)
    kept = [d for d in range(value.ndim) if d != dim]
    if isinstance(place, Undecided):
        new: Any = Undecided(place.param, tuple(place.dims[d] for d in kept), place.looked_up)
        results = [e.result(call, None, new, i) for i in range(len(call.shapes))]
    else:
        assert isinstance(place, Sharded)
        if place.dim == dim:
            raise Unproven("takes single entries of the divided dimension")
        ref = e.replay(call)
        new = Sharded(kept.index(place.dim), place.owners, place.origin)
        results = [e.result(call, e.item(ref, i), new, i) for i in range(len(call.shapes))]
    for result in results:
        result.weight = value.weight
    return results


# ------------------------------------------------------------------------------------------------------ writing back
@rule("slice_scatter")
def slice_scatter(e: Engine, call: Call) -> Any:
    """A copy of the operand with a slice replaced: both divided alike, along another dimension than the slice's."""
    value, source = call.value("self"), call.value("src")
    dim = call.dim("dim", value.ndim)
    if source.ndim != value.ndim:
        raise Unproven("writes a slice of another rank")
    lead = _lead_of_write(e, [value, source])
    place = e.sharded(lead)
    if place.dim == dim:
        if source.shapes != value.shapes:
            raise Unproven("writes a piece of the divided dimension")
        return e.result(call, e.part(source, dim, place.owners), Sharded(dim, place.owners, place.origin))
    refs, owners, origin = e.alike([value, source], lead, place.dim)
    return e.result(call, e.replay(call, self=refs[0], src=refs[1]), Sharded(place.dim, owners, origin))


@rule("select_scatter")
def select_scatter(e: Engine, call: Call) -> Any:
    """A copy of the operand with one index of ``dim`` replaced; the source lacks that dimension."""
    value, source = call.value("self"), call.value("src")
    dim = call.dim("dim", value.ndim)
    lead = _lead_of_write(e, [value, source])
    place = e.sharded(lead)
    at = place.dim if lead is value else place.dim + (place.dim >= dim)
    if at == dim:
        raise Unproven("writes one index of the divided dimension")
    owners, origin = place.owners, place.origin
    refs = {}
    for name, operand, own in (("self", value, at), ("src", source, at - (at > dim))):
        if operand is not lead and e.is_sharded(operand, own):
            try:
                owners = e.unify(owners, e.sharded(operand).owners)
                origin |= e.sharded(operand).origin
            except Unproven:
                operand = e.full(operand, "operands divided differently")
        elif e.is_sharded(operand) and operand is not lead:
            operand = e.full(operand, "operands divided differently")
        refs[name] = e.part(operand, own, owners)
    return e.result(call, e.replay(call, **refs), Sharded(at, owners, origin))


def _lead_of_write(e: Engine, values: list[Value]) -> Value:
    divided = [v for v in values if e.is_sharded(v)]
    if not divided:
        raise Unproven("only a parameter is divided")
    return max(divided, key=lambda v: v.nbytes)


# ------------------------------------------------------------------------------------------------------ joining
@rule("cat", "concat", "concatenate")
def cat(e: Engine, call: Call) -> Any:
    ndim = len(call.shapes[0])
    # An empty vector may be joined to tensors of any shape (an empty cache).
    values = [v for v in call["tensors"] if ndim == 1 or any(shape != (0,) for shape in v.shapes)]
    dim = call["dim"] % ndim
    divided = [v for v in values if e.is_sharded(v)]
    if not divided:
        for value in values:
            if e.undecided(value):
                e.commit(value)
        return e.visit_again(call)
    lead = max(divided, key=lambda v: v.nbytes)
    place = e.sharded(lead)
    if place.dim == dim:
        if not all(e.is_sharded(v, dim) for v in values):
            raise Unproven("joins whole and divided pieces")
        owners = tuple(np.concatenate([e.sharded(v).owners[k] for v in values]) for k in range(e.assignments))
        if not e.solving and pattern(owners) is None:
            raise Unproven("joins pieces of free size")
        origin = frozenset().union(*(e.sharded(v).origin for v in values))
        return e.result(call, e.replay(call, tensors=values), Sharded(dim, owners, origin))
    refs, owners, origin = e.alike(values, lead, place.dim)
    return e.result(call, e.replay(call, tensors=refs), Sharded(place.dim, owners, origin))


@rule("stack")
def stack(e: Engine, call: Call) -> Any:
    values: list[Value] = list(call["tensors"])
    dim = call["dim"] % len(call.shapes[0])
    divided = [v for v in values if e.is_sharded(v)]
    if not divided:
        raise Unproven("stacks parameters")
    lead = max(divided, key=lambda v: v.nbytes)
    place = e.sharded(lead)
    refs, owners, origin = e.alike(values, lead, place.dim)
    return e.result(call, e.replay(call, tensors=refs), Sharded(place.dim + (dim <= place.dim), owners, origin))
