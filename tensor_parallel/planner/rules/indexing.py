"""Lookups: embedding tables, indexing by tensors, gather and scatter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import PARTIAL, Replicated, Sharded, Undecided, Unproven, positions
from tensor_parallel.planner.program import PerRank
from tensor_parallel.planner.rules.pieces import balanced
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.traced import Traced
from tensor_parallel.planner.values import Call, Value

aten = torch.ops.aten


@rule("embedding")
def embedding(e: Engine, call: Call) -> Any:
    """Rows of a table. By rows: other ranks' rows are zero, a pending sum; by columns: each rank its own features."""
    table, ids = call.value("weight"), call.value("indices")
    e.commit_whole(ids)
    if not isinstance(e.place(ids), Replicated) and ids.whole is None:
        raise Unproven("ids are divided")
    place = e.place(table)
    lead = ids.ndim
    if isinstance(place, Undecided):
        result = e.result(
            call, None, Undecided(place.param, (*(None,) * lead, place.dims[1]), looked_up=place.dims[0] == 0)
        )
        result.weight = table.weight
        return result
    if not isinstance(place, Sharded):
        return e.visit_again(call)  # only the ids were undecided
    if place.dim == 1:
        ref = e.emit(aten.embedding.default, table, ids)
        return e.result(call, ref, Sharded(lead, place.owners, place.origin))
    return _rows(e, call, table, place, ids)


def _rows(e: Engine, call: Call, table: Value, place: Sharded, ids: Any) -> Value:
    """Rows of a table divided by rows: zeros for other ranks' rows, a pending sum."""
    if e.solving:
        return e.result(call, None, PARTIAL)
    e.exclusive(place.owners)
    owner = place.owners[0]
    if any(len(o) != len(owner) for o in place.owners):
        raise Unproven("rows of a table of free size")
    runs = PerRank(tuple(_runs(positions(owner, rank)) for rank in range(e.ranks)))
    return e.result(call, e.emit(runtime.lookup_rows, table, ids, runs, len(owner)), PARTIAL)


def _runs(index: NDArray[np.int64]) -> tuple[tuple[int, int, int], ...]:
    """Runs of consecutive ids as (start, stop, offset in the local table)."""
    if not len(index):
        return ((0, 0, 0),)
    offsets = np.flatnonzero(np.diff(index, prepend=-2) != 1)
    stops = index[np.append(offsets[1:], len(index)) - 1] + 1
    return tuple(zip(index[offsets].tolist(), stops.tolist(), offsets.tolist(), strict=True))


@rule("index")
def index(e: Engine, call: Call) -> Any:
    """``x[..., i, ..., j]``: the divided dimension must not be indexed."""
    value = call.value("self")
    indices: list[Any] = list(call["indices"])
    for item in indices:
        if isinstance(item, Value):
            e.commit_whole(item)
        if isinstance(item, Value) and not isinstance(e.place(item), Replicated) and item.whole is None:
            raise Unproven("an index is divided")
        if isinstance(item, Value) and item.dtype == torch.bool:
            raise Unproven("a boolean index")
    used = [d for d, item in enumerate(indices) if item is not None]
    width = max(item.ndim for item in indices if item is not None)
    adjacent = used == list(range(used[0], used[-1] + 1))
    kept = [d for d in range(value.ndim) if d not in used]
    front = [d for d in kept if d < used[0]] if adjacent else []
    mapping: list[int | None] = [*front, *[None] * width, *[d for d in kept if d not in front]]
    place = e.place(value)
    is_lookup = used == [0] and value.ndim == 2 and value.dtype.is_floating_point
    if isinstance(place, Undecided):
        dims = tuple(None if m is None else place.dims[m] for m in mapping)
        result = e.result(call, None, Undecided(place.param, dims, looked_up=is_lookup and place.dims[0] == 0))
        result.weight = value.weight
        return result
    if is_lookup and e.is_sharded(value, 0):
        return _rows(e, call, value, e.sharded(value), e.emit(runtime.from_the_front, indices[0], value.shapes[0][0]))
    if isinstance(place, Sharded) and used == [place.dim]:
        return _constant_rows(e, call, value, place)
    if not isinstance(place, Sharded) or place.dim in used:
        raise Unproven("indexes the divided dimension")
    return e.result(call, e.replay(call), Sharded(mapping.index(place.dim), place.owners, place.origin))


def _constant_rows(e: Engine, call: Call, value: Value, place: Sharded) -> Value:
    """Indices of the divided dimension that are written into the model: ``x[..., [-2], :]``."""
    asked = constant_of(e.traced, call.node.args[1][place.dim])  # type: ignore[index]
    if asked is None or asked.ndim != 1 or asked.dtype == torch.bool:
        raise Unproven("indexes the divided dimension")
    index = asked.numpy()
    owners = tuple(owner[index] for owner in place.owners)
    balanced(e, owners)
    e.cut(owners)
    if e.solving:
        return e.result(call, None, Sharded(place.dim, owners, place.origin))
    if any(len(owner) != len(place.owners[0]) for owner in place.owners):
        raise Unproven("indexes a dimension of free size")
    local = []
    for rank in range(e.ranks):
        held = positions(place.owners[0], rank)
        wanted = (index % len(place.owners[0]))[positions(owners[0], rank)]
        local.append(tuple(np.searchsorted(held, wanted).tolist()))
    ref = e.emit(runtime.take_indices, value, place.dim, PerRank(tuple(local)))
    return e.result(call, ref, Sharded(place.dim, owners, place.origin))


def constant_of(traced: Traced, node: Any) -> Tensor | None:
    """The tensor that a node is, where it is a constant of the trace."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _COPIES:
        node = node.args[0]
    return next((tensor for known, tensor in traced.constants.values() if known is node), None)


_COPIES = (aten.lift_fresh_copy.default, aten.clone.default, aten.detach.default, aten.alias.default)


@rule("index_select")
def index_select(e: Engine, call: Call) -> Any:
    value = call.value("self")
    dim = call.dim("dim", value.ndim)
    place = e.place(value)
    e.commit_whole(call.value("index"))
    if not isinstance(e.place(call.value("index")), Replicated):
        raise Unproven("the index is divided")
    is_lookup = dim == 0 and value.ndim == 2 and value.dtype.is_floating_point
    if isinstance(place, Undecided):
        dims = tuple(None if d == dim else p for d, p in enumerate(place.dims))
        looked_up = place.looked_up or (is_lookup and place.dims[0] == 0)
        result = e.result(call, None, Undecided(place.param, dims, looked_up))
        result.weight = value.weight
        return result
    if is_lookup and e.is_sharded(value, 0):
        return _rows(e, call, value, e.sharded(value), call.value("index"))
    if not isinstance(place, Sharded) or place.dim == dim:
        raise Unproven("selects along the divided dimension")
    return e.result(call, e.replay(call), Sharded(place.dim, place.owners, place.origin))


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "scatter_src_")
def along_index(e: Engine, call: Call) -> Any:
    """Index along one dimension, elementwise in all others: these are divided alike."""
    value = call.value("self")
    names = [a.name for a in call.arguments if isinstance(call[a.name], Value)]
    dim = call.dim("dim", value.ndim)
    operands = [call.value(name) for name in names]
    divided = [v for v in operands if e.is_sharded(v)]
    if not divided:
        raise Unproven("only parameters are divided")
    lead = max(divided, key=lambda v: v.nbytes)
    place = e.sharded(lead)
    if place.dim == dim:
        raise Unproven("indexes the divided dimension")
    if any(
        v.ndim != lead.ndim or any(s[place.dim] != t[place.dim] for s, t in zip(v.shapes, lead.shapes, strict=True))
        for v in operands
    ):
        raise Unproven("operands of different sizes along the divided dimension")
    refs, owners, origin = e.alike(operands, lead, place.dim)
    ref = e.replay(call, **dict(zip(names, refs, strict=True)))
    return e.result(call, ref, Sharded(place.dim, owners, origin))


@rule("index_add", "index_copy")
def index_add(e: Engine, call: Call) -> Any:
    value, source = call.value("self"), call.value("source")
    dim = call.dim("dim", value.ndim)
    divided = [v for v in (value, source) if e.is_sharded(v)]
    if not divided or not isinstance(e.place(call.value("index")), Replicated):
        raise Unproven("the index is divided")
    place = e.sharded(divided[0])
    if place.dim == dim:
        raise Unproven("adds along the divided dimension")
    refs, owners, origin = e.alike([value, source], divided[0], place.dim)
    return e.result(call, e.replay(call, self=refs[0], source=refs[1]), Sharded(place.dim, owners, origin))


@rule("index_put")
def index_put(e: Engine, call: Call) -> Any:
    """Writing rows: target and rows divided along a dimension that is not indexed."""
    value, source = call.value("self"), call.value("values")
    indices = list(call["indices"])
    used = [d for d, item in enumerate(indices) if item is not None]
    if any(not isinstance(e.place(i), Replicated) or i.dtype == torch.bool for i in indices if isinstance(i, Value)):
        raise Unproven("an index is divided or boolean")
    if used != list(range(len(used))):
        raise Unproven("indexes other than leading dimensions")
    width = max(item.ndim for item in indices if item is not None)
    shift = width - len(used)
    divided = [v for v in (value, source) if e.is_sharded(v)]
    if not divided:
        raise Unproven("only parameters are divided")
    place = e.sharded(divided[0])
    dim = place.dim if divided[0] is value else place.dim - shift
    if dim < len(used) or source.ndim != value.ndim + shift:
        raise Unproven("writes along the divided dimension")
    owners = place.owners
    refs = {}
    for name, operand, at in (("self", value, dim), ("values", source, dim + shift)):
        refs[name] = e.part(operand, at, owners)
    return e.result(call, e.replay(call, **refs), Sharded(dim, owners, place.origin))
