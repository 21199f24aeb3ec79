"""Reshapes: ownership is worked out within the smallest group of dimensions that contains the divided one, and checked
against the reshape of each rank's part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import (
    REPLICATED,
    Owners,
    Replicated,
    Sharded,
    Undecided,
    Unproven,
    counts,
    pattern,
    positions,
)
from tensor_parallel.planner.program import PerRank
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.traced import Shapes
from tensor_parallel.planner.values import Call, Sym, Value

aten = torch.ops.aten

Group = tuple[int, int, int, int]
_LIMIT = 1 << 24


def reshape_group(source: Sequence[int], target: Sequence[int], dim: int) -> Group:
    """Dimensions ``[i0, i1)`` of the source that become exactly ``[j0, j1)`` of the target, with ``dim`` among the
    former.

    A row-major reshape never moves an element between such groups, so the others may be ignored.
    """
    i = j = 0
    while i < len(source):
        i0, j0 = i, j
        left, right = source[i], 1
        i += 1
        if left != 1 or i0 == dim:
            while left != right:
                if right < left:
                    if j == len(target):
                        raise Unproven("shapes do not match")
                    right *= target[j]
                    j += 1
                else:
                    if i == len(source):
                        raise Unproven("shapes do not match")
                    left *= source[i]
                    i += 1
        elif j < len(target) and target[j] == 1:
            j += 1
        if i0 <= dim < i:
            return i0, i, j0, j
    raise Unproven("the divided dimension was not found")


def reshape_owners(e: Engine, place: Sharded, before: Shapes, after: Shapes) -> tuple[int, Owners]:
    """The divided dimension of the result and its owners; proves that a local reshape gives just that."""
    groups = [reshape_group(b, a, place.dim) for b, a in zip(before, after, strict=True)]
    labels = []
    for (i0, i1, j0, j1), b, a, owner in zip(groups, before, after, place.owners, strict=True):
        if int(np.prod(b[i0:i1])) > _LIMIT:
            raise Unproven("too large to follow")
        along = owner.reshape([-1 if d == place.dim else 1 for d in range(i0, i1)])
        labels.append(np.broadcast_to(along, b[i0:i1]).reshape(a[j0:j1]))
    starts = {g[2] for g in groups}
    if len(starts) != 1 or len({g[3] for g in groups}) != 1:
        raise Unproven("groups differently at different sizes")
    offset = starts.pop()
    within, owners = e.regroup(labels, offset)
    dim = within + offset
    if not e.solving:
        for k, (i0, i1, j0, j1) in enumerate(groups):
            _check(e.ranks, place.owners[k], place.dim - i0, before[k][i0:i1], owners[k], within, after[k][j0:j1])
        if pattern(owners) is None:
            raise Unproven("a division that no pattern describes at every size")
    return dim, owners


def _check(
    ranks: int,
    owner: np.ndarray,
    dim: int,
    before: Sequence[int],
    new_owner: np.ndarray,
    new_dim: int,
    after: Sequence[int],
) -> None:
    """Number the elements, reshape each rank's part, and compare with the part of the reshaped whole."""
    ids = np.arange(int(np.prod(before)), dtype=np.int64).reshape(before)
    moved = ids.reshape(after)
    for rank in range(ranks):
        part = ids.take(positions(owner, rank), axis=dim)
        want = moved.take(positions(new_owner, rank), axis=new_dim)
        if part.size != want.size or not np.array_equal(part.reshape(want.shape), want):
            raise Unproven("the local reshape gives other elements")


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def reshape(e: Engine, call: Call) -> Any:
    value = call.value("self")
    if isinstance(call["dtype"] if any(a.name == "dtype" for a in call.arguments) else None, torch.dtype):
        raise Unproven("reinterprets bytes")
    place = e.place(value)
    if isinstance(place, Undecided):
        e.settle_for_reshape(value)
        return e.visit_again(call)
    if isinstance(place, Replicated):  # as divided as another, of which only the whole sizes matter
        return e.result(call, e.emit(aten.reshape.default, value, sizes_of(e, call)), REPLICATED)
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
    sizes = sizes_of(e, call) if call.name in ("view_as", "reshape_as") else list(call[name])
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


def sizes_of(e: Engine, call: Call) -> list[Any]:
    """The global sizes of the tensor whose shape is taken; those of free dimensions are read from it when it runs."""
    other = call.value("other")
    fake: Any = call.node.meta["val"]
    sizes: list[Any] = []
    for d, size in enumerate(fake.shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        if e.is_sharded(other, d):
            raise Unproven("a free size taken from a divided dimension")
        values = tuple(shape[d] for shape in call.shapes)
        sizes.append(Sym(e.emit(aten.sym_size.int, other, d), values))
    return sizes
