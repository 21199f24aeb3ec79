"""Operations that commute with the sum over ranks: the sum can wait, and several sums become one."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import PARTIAL, Replicated, Unproven
from tensor_parallel.planner.program import PerRank
from tensor_parallel.planner.rules.pointwise import is_pending
from tensor_parallel.planner.rules.registry import partial_rule
from tensor_parallel.planner.values import Call, Value

_SAME_SIZE = [
    "alias",
    "clone",
    "contiguous",
    "detach",
    "flatten",
    "lift_fresh_copy",
    "movedim",
    "neg",
    "numpy_T",
    "permute",
    "reshape",
    "squeeze",
    "swapaxes",
    "t",
    "to",
    "_to_copy",
    "transpose",
    "unflatten",
    "unsqueeze",
    "_unsafe_view",
    "view",
]
_SHRINKING = [
    "chunk",
    "cumsum",
    "expand",
    "flip",
    "index",
    "index_select",
    "mean",
    "narrow",
    "repeat",
    "roll",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "sum",
    "tensor_split",
    "unbind",
    "constant_pad_nd",
    "gather",
]


@partial_rule(*_SAME_SIZE)
def same_size(e: Engine, call: Call) -> Any:
    """Movement and copies. If the whole is asked for later, the operand is reduced once and this is repeated on it."""
    value = _only_pending(e, call)
    if not call.dtypes.is_floating_point:
        raise Unproven("not a floating-point sum")
    result = e.result(call, e.replay(call), PARTIAL)
    result.redo = (value, call, None)
    return result


@partial_rule(*_SHRINKING)
def shrinking(e: Engine, call: Call) -> Any:
    """Selections and linear reductions of a pending sum, by replicated indices."""
    value = _only_pending(e, call)
    first = next(iter(call.bound.values()))
    if first is not value:
        raise Unproven("the sum is not the operand selected from")
    if call.name == "constant_pad_nd" and call["value"] not in (0, 0.0):
        raise Unproven("padding with a constant")
    if call["dtype"] is not None if "dtype" in {a.name for a in call.arguments} else False:
        raise Unproven("changes dtype")
    ref = e.replay_entered(call, value)
    if isinstance(call.shapes, list):
        results = [e.result(call, e.item(ref, i), PARTIAL, i) for i in range(len(call.shapes))]
        for i, result in enumerate(results):
            result.redo = (value, call, i)  # one reduction of the whole, not one per piece
        return results
    result = e.result(call, ref, PARTIAL)
    if _used_elsewhere(call):
        result.redo = (value, call, None)
    return result


def _used_elsewhere(call: Call) -> bool:
    """Whether others use the operand too, so that reducing it once serves them all."""
    operand = call.node.args[0]
    return isinstance(operand, fx.Node) and len(operand.users) > 1


@partial_rule("mul", "div", "multiply", "divide", "true_divide")
def scale(e: Engine, call: Call) -> Any:
    """A pending sum times, or divided by, something whole."""
    value = _only_pending(e, call)
    if call.name != "mul" and call["self"] is not value:
        raise Unproven("divides by the sum")
    if call["rounding_mode"] if any(a.name == "rounding_mode" for a in call.arguments) else None:
        raise Unproven("rounds")
    if value.shapes != call.shapes:
        raise Unproven("the product is larger than the sum")
    return e.result(call, e.replay_entered(call, value), PARTIAL)


@partial_rule("where", "masked_fill")
def mask(e: Engine, call: Call) -> Any:
    """Zeroing entries of a pending sum."""
    value = _only_pending(e, call)
    other = [call[name] for name in ("self", "other", "value") if any(a.name == name for a in call.arguments)]
    constants = [o for o in other if o is not value]
    if constants not in ([0], [0.0]) or value.shapes != call.shapes:
        raise Unproven("fills with something else than zero")
    return e.result(call, e.replay_entered(call, value), PARTIAL)


@partial_rule("add", "sub", "subtract")
def add(e: Engine, call: Call) -> Any:
    """Sums of pending sums, and of a pending sum with something whole of the same or a smaller shape."""
    a, b, alpha = call["self"], call["other"], call["alpha"]
    if is_pending(e, a) and is_pending(e, b):
        return e.result(call, e.replay(call), PARTIAL)
    pending, other = (a, b) if is_pending(e, a) else (b, a)
    if not isinstance(other, Value) or pending.shapes != call.shapes or pending.dtype != call.dtypes:
        raise Unproven("adds a constant, or broadcasts the sum")
    if not isinstance(e.place(other), Replicated) and other.whole is None:
        if not e.undecided(other):
            raise Unproven("adds a divided value")
        e.commit(other)
        return e.visit_again(call)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise Unproven("a scale that is not a constant")
    if call.name != "add" and pending is b:
        raise Unproven("subtracts the sum")
    factor = -alpha if call.name != "add" else alpha
    if pending is b and alpha != 1:
        raise Unproven("scales the sum")
    whole = other if other.whole is None else other.whole
    first = PerRank(tuple(rank == 0 for rank in range(e.ranks)))
    return e.result(call, e.emit(runtime.add_once, pending, whole, factor, first), PARTIAL)


@partial_rule("cat", "stack")
def join(e: Engine, call: Call) -> Any:
    """Pending sums side by side."""
    if not all(is_pending(e, v) for v in call["tensors"]):
        raise Unproven("not all are pending sums")
    return e.result(call, e.replay(call), PARTIAL)


@partial_rule("index_add", "scatter_add")
def accumulate(e: Engine, call: Call) -> Any:
    """Adding rows of a pending sum into something whole, by replicated indices."""
    source_name = "source" if call.name == "index_add" else "src"
    base, source = call.value("self"), call.value(source_name)
    if not is_pending(e, source):
        raise Unproven("the rows are not a pending sum")
    if call["alpha"] != 1 if any(a.name == "alpha" for a in call.arguments) else False:
        raise Unproven("scales the rows")
    if not isinstance(e.place(call.value("index")), Replicated):
        raise Unproven("indices are divided")
    zeros = e.emit(_zeros_like, base)
    ref = e.replay(call, self=zeros)
    if is_pending(e, base):
        return e.result(call, e.emit(_add, ref, base), PARTIAL)
    if not isinstance(e.place(base), Replicated):
        raise Unproven("the target is divided")
    first = PerRank(tuple(rank == 0 for rank in range(e.ranks)))
    return e.result(call, e.emit(runtime.add_once, ref, base, 1, first), PARTIAL)


@partial_rule("index_put")
def accumulate_at(e: Engine, call: Call) -> Any:
    """``index_put`` of a pending sum at replicated indices, into whole or pending values."""
    base, source = call.value("self"), call.value("values")
    if not is_pending(e, source) or not call["accumulate"]:
        raise Unproven("overwrites")
    indices = [
        v for v in pytree.tree_leaves(call["indices"], is_leaf=lambda x: isinstance(x, Value)) if isinstance(v, Value)
    ]
    if not all(isinstance(e.place(i), Replicated) for i in indices) or not isinstance(e.place(base), Replicated):
        raise Unproven("indices or target are divided")
    ref = e.replay(call, self=e.emit(_zeros_like, base))
    first = PerRank(tuple(rank == 0 for rank in range(e.ranks)))
    return e.result(call, e.emit(runtime.add_once, ref, base, 1, first), PARTIAL)


def _zeros_like(value: Any) -> Any:
    return value.new_zeros(value.shape)


def _add(a: Any, b: Any) -> Any:
    return a + b


def _only_pending(e: Engine, call: Call) -> Value:
    """The one pending operand; every other operand must be whole."""
    pending = [v for v in call.values() if is_pending(e, v)]
    if len(pending) != 1:
        raise Unproven("several pending sums")
    for value in call.values():
        if value is pending[0]:
            continue
        if e.undecided(value):
            e.commit_whole(value)
        if not isinstance(e.place(value), Replicated) and value.whole is None:
            raise Unproven("another operand is divided")
    return pending[0]
