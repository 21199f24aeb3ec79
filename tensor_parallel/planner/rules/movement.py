"""Data movement: which elements end up where is worked out on the owners, and checked against the move on the local
part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Call, Engine, Sym, Value
from tensor_parallel.planner.placement import Owners, Sharded, Undecided, Unproven, counts, pattern, positions
from tensor_parallel.planner.program import PerRank
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.rules.reshape import reshape_owners

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------- dimensions in another
# order
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


# ----------------------------------------------------------------------------------------------- along dimensions, in
# place
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


@rule("expand_as", "view_as", "reshape_as")
def expand_as(e: Engine, call: Call) -> Any:
    value, other = call.value("self"), call.value("other")
    if value.shapes != other.shapes or e.undecided(value):
        raise Unproven("a shape taken from a divided value")
    return remap(e, call, list(range(value.ndim)), value.ref)


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


# ------------------------------------------------------------------------------------------------------ pieces
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
    _balanced(e, owners)
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


def _balanced(e: Engine, owners: Owners) -> None:
    for owner in owners:
        if not e.every_rank(owner):
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
        _balanced(e, piece)
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


# ------------------------------------------------------------------------------------------------------ joining
@rule("cat", "concat", "concatenate")
def cat(e: Engine, call: Call) -> Any:
    values: list[Value] = list(call["tensors"])
    ndim = len(call.shapes[0])
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
        return e.result(call, e.replay(call), Sharded(dim, owners, origin))
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


# ------------------------------------------------------------------------------------------------------ reshaping
@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def reshape(e: Engine, call: Call) -> Any:
    value = call.value("self")
    if isinstance(call["dtype"] if any(a.name == "dtype" for a in call.arguments) else None, torch.dtype):
        raise Unproven("reinterprets bytes")
    place = e.place(value)
    if isinstance(place, Undecided):
        e.settle_for_reshape(value)
        return e.visit_again(call)
    assert isinstance(place, Sharded)
    dim, owners = reshape_owners(e, place, value.shapes, call.shapes)
    if e.solving:
        return e.result(call, None, Sharded(dim, owners, place.origin))
    result = e.result(call, _emit_reshape(e, call, value, dim, owners), Sharded(dim, owners, place.origin))
    result.weight = value.weight
    return result


def _emit_reshape(e: Engine, call: Call, value: Value, dim: int, owners: Owners) -> Any:
    """The local reshape: the divided dimension's size is this rank's, or inferred where it scales with a free one."""
    if call.name == "flatten":
        return e.replay(call)
    start, name = 0, "shape" if any(a.name == "shape" for a in call.arguments) else "size"
    if call.name == "unflatten":
        start, name = call.dim("dim", value.ndim), "sizes"
    sizes = list(call[name])
    at = dim - start
    if 0 <= at < len(sizes):
        if all(o is owners[0] or np.array_equal(o, owners[0]) for o in owners):
            sizes[at] = PerRank(counts(owners[0], e.ranks))
        elif isinstance(sizes[at], Sym):
            described = pattern(owners)
            assert described is not None, "checked when the owners were worked out"
            sizes[at] = e.emit(runtime.share, sizes[at], PerRank(counts(described.base, e.ranks)), len(described.base))
    if call.name == "unflatten":
        return e.replay(call, sizes=sizes)
    return e.emit(aten.reshape.default, value, sizes)


__all__ = ["along", "positions", "remap"]
