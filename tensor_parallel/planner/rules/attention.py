"""Scaled dot product attention divided by heads (or whatever batch dimension), with grouped queries."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import Owners, Replicated, Sharded, Undecided, Unproven, positions
from tensor_parallel.planner.program import PerRank, Ref
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.values import Call, Value


@rule("scaled_dot_product_attention", "_scaled_dot_product_attention")
def attention(e: Engine, call: Call) -> Any:
    query, key, value = call.value("query"), call.value("key"), call.value("value")
    divided = [v for v in (query, key, value) if e.is_sharded(v)]
    if not divided:
        raise Unproven("only the mask is divided")
    at = _heads(e, query, divided)
    query, key, value = (_by_heads(e, v, at) for v in (query, key, value))
    divided = [v for v in (query, key, value) if e.is_sharded(v)]
    if not e.is_sharded(query):
        owners = _expanded(e, e.sharded(divided[0]), divided[0], query, at)
        query_ref = e.part(query, query.ndim + at, owners)
        origin = e.sharded(divided[0]).origin
    else:
        owners, query_ref, origin = e.sharded(query).owners, query.ref, e.sharded(query).origin
    refs: dict[str, Ref | None] = {}
    grouped = bool(call["enable_gqa"])
    groups = {_group(query, v, at) for v in (key, value)}
    if len(groups) != 1:
        raise Unproven("keys and values have different head counts")
    group = groups.pop()
    whole_heads = [v for v in (key, value) if not e.is_sharded(v)]
    if group > 1 and whole_heads:
        # Some are whole: give every local query head its own key and value head.
        grouped = False
        for name, operand in (("key", key), ("value", value)):
            refs[name] = _own_heads(e, operand, at, owners, group)
    else:
        for name, operand in (("key", key), ("value", value)):
            refs[name], owners, origin = _same_heads(e, operand, at, owners, group, origin)
    replacements: dict[str, Any] = {"query": query_ref, **refs}
    if any(a.name == "enable_gqa" for a in call.arguments):
        replacements["enable_gqa"] = grouped
    mask = call["attn_mask"]
    if isinstance(mask, Value):
        replacements["attn_mask"] = _mask(e, mask, at, owners, query)
    place = Sharded(len(call.shapes[0]) + at, owners, origin)
    random = isinstance(call["dropout_p"], float) and call["dropout_p"] > 0
    return e.result(call, e.replay_random(call, **replacements) if random else e.replay(call, **replacements), place)


def _heads(e: Engine, query: Value, divided: list[Value]) -> int:
    """The dimension, counted from the right, along which to divide: the query's, else the keys'."""
    for value in sorted(divided, key=lambda v: v is not query):
        at = e.sharded(value).dim - value.ndim
        if at <= -3:
            return at
    raise Unproven("not divided by heads")


def _by_heads(e: Engine, value: Value, at: int) -> Value:
    place = e.place(value)
    if isinstance(place, Sharded) and place.dim - value.ndim != at:
        return e.full(value, "not divided by heads")
    return value


def _group(query: Value, operand: Value, at: int) -> int:
    heads, own = query.shapes[0][at], operand.shapes[0][at]
    if heads % own:
        raise Unproven("query heads are no multiple of key heads")
    return heads // own


def _expanded(e: Engine, place: Sharded, operand: Value, query: Value, at: int) -> Owners:
    group = _group(query, operand, at)
    return tuple(np.repeat(o, group) for o in place.owners)


def _same_heads(e: Engine, operand: Value, at: int, owners: Owners, group: int, origin: frozenset[str]) -> Any:
    """Keys divided as their queries are; the queries of one key head stay together."""
    dim = operand.ndim + at
    place = e.place(operand)
    if isinstance(place, Sharded):
        if place.dim != dim:
            raise Unproven("keys are divided along another dimension")
        owners = e.unify(owners, tuple(np.repeat(o, group) for o in place.owners) if group > 1 else place.owners)
        return operand.ref, owners, origin | place.origin
    if isinstance(place, Undecided):
        raise Unproven("keys are a parameter")
    return e.part(operand, dim, owners), owners, origin


def _own_heads(e: Engine, operand: Value, at: int, owners: Owners, group: int) -> Ref | None:
    if e.is_sharded(operand):
        operand = e.full(operand, "keys are divided and values are not, or the reverse")
    if e.solving:
        return None
    if any(not np.array_equal(o, owners[0]) for o in owners):
        raise Unproven("heads of a free number")
    index = tuple(tuple(int(p) // group for p in positions(owners[0], r)) for r in range(e.ranks))
    return e.emit(runtime.select_heads, e.enter(operand), operand.ndim + at, PerRank(index))


def _mask(e: Engine, mask: Value, at: int, owners: Owners, query: Value) -> Ref | None:
    dim = mask.ndim + at
    place = e.place(mask)
    if isinstance(place, Sharded) and place.dim != dim:
        raise Unproven("the mask is divided along another dimension")
    if dim < 0 or (not isinstance(place, Sharded) and mask.shapes[0][dim] == 1 and query.shapes[0][at] != 1):
        if isinstance(place, Undecided):
            e.commit_whole(mask)
        if not isinstance(e.place(mask), Replicated) and mask.whole is None:
            mask = e.full(mask, "a mask shared by all heads")
        return e.enter(mask)
    return e.part(mask, dim, owners)
