"""Elementwise operations with broadcasting: each output element depends on one element of each operand."""

from __future__ import annotations

from typing import Any

import torch

from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import Partial, Replicated, Sharded, Undecided, Unproven
from tensor_parallel.planner.rules.registry import rule
from tensor_parallel.planner.values import Call, Value

UNARY = [
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "alias",
    "bitwise_not",
    "ceil",
    "celu",
    "clamp",
    "clamp_max",
    "clamp_min",
    "clip",
    "clone",
    "contiguous",
    "cos",
    "cosh",
    "detach",
    "elu",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "fill",
    "float",
    "floor",
    "frac",
    "gelu",
    "half",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "isfinite",
    "isinf",
    "isnan",
    "leaky_relu",
    "lgamma",
    "lift_fresh_copy",
    "log",
    "log10",
    "log1p",
    "log2",
    "log_sigmoid",
    "logical_not",
    "logit",
    "mish",
    "nan_to_num",
    "neg",
    "negative",
    "ones_like",
    "positive",
    "prelu_",
    "reciprocal",
    "relu",
    "relu6",
    "round",
    "rrelu_eval",
    "rsqrt",
    "rsub",
    "selu",
    "sigmoid",
    "sign",
    "sin",
    "sinc",
    "sinh",
    "softplus",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "tanhshrink",
    "threshold",
    "to",
    "trunc",
    "zeros_like",
    "full_like",
    "empty_like",
    "_to_copy",
    "_conj",
    "conj",
    "resolve_conj",
    "resolve_neg",
    "real_",
    "type_as",
    "bool_",
    "silu",
    "sgn",
    "special_expm1",
    "special_erf",
    "fill_",
    "digamma",
    "i0",
    "deg2rad",
    "rad2deg",
]
BINARY = [
    "__and__",
    "__or__",
    "__xor__",
    "__lshift__",
    "__rshift__",
    "add",
    "addcdiv",
    "addcmul",
    "atan2",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "copysign",
    "copy",
    "div",
    "divide",
    "eq",
    "floor_divide",
    "fmax",
    "fmin",
    "fmod",
    "ge",
    "greater",
    "greater_equal",
    "gt",
    "hypot",
    "le",
    "lerp",
    "less",
    "less_equal",
    "logaddexp",
    "logical_and",
    "logical_or",
    "logical_xor",
    "lt",
    "masked_fill",
    "max_other",
    "maximum",
    "minimum",
    "mul",
    "multiply",
    "ne",
    "not_equal",
    "pow",
    "remainder",
    "special_xlogy",
    "sub",
    "subtract",
    "true_divide",
    "where",
    "xlogy",
    "bitwise_left_shift",
    "bitwise_right_shift",
    "float_power",
]

RANDOM_NAMES = ("dropout", "native_dropout", "alpha_dropout", "feature_dropout", "bernoulli", "rand_like", "randn_like")


def is_unary_view(e: Engine, call: Call) -> Value | None:
    values = call.values()
    return values[0] if len(values) == 1 else None


@rule(*UNARY, *BINARY)
def elementwise(e: Engine, call: Call) -> Any:
    """``f(a, b, ...)`` with operands broadcast: all divided alike along one dimension counted from the right."""
    if isinstance(call.shapes, list) or call.shapes is None:
        raise Unproven("several results")
    values = call.values()
    single = values[0] if len(values) == 1 else None
    if single is not None and isinstance(place := e.place(single), Undecided):
        if place.looked_up and call.name not in _LINEAR_UNARY:
            e.commit(single)
            return e.visit_again(call)
        result = e.result(call, None, place)
        result.weight = single.weight
        return result
    lead, owners = _lead(e, values)
    if lead is None:
        return _undecided_only(e, call, values)
    negative = e.sharded(lead).dim - lead.ndim
    refs = {id(lead): lead.ref}
    origin = e.sharded(lead).origin
    for value in values:
        if value is lead:
            continue
        refs[id(value)], owners, origin = _align(e, value, negative, owners, origin, call)
    ref = e.replay_with(call, refs)
    ndim = len(call.shapes[0])
    result = e.result(call, ref, Sharded(ndim + negative, owners, origin))
    if not e.solving and result.dtype in (torch.float64, torch.float32, torch.bfloat16):  # float16 would overflow
        _factor(e, call, result, lead, refs)
    return result


def _factor(e: Engine, call: Call, result: Value, lead: Value, refs: dict[int, Any]) -> None:
    """Note a product whose other factor is one whole number per row: what is linear in it may be scaled afterwards."""
    values = call.values()
    factored = [v for v in values if v.factors is not None]
    if call.name in ("mul", "multiply") and len(values) == 2 and not factored:
        other = next(v for v in values if v is not lead) if values[0] is not values[1] else lead
        dim = other.ndim + e.sharded(result).dim - result.ndim
        whole = other if other.whole is None else other.whole
        if (
            other is not lead
            and isinstance(e.place(whole), Replicated)
            and lead.dtype == result.dtype == other.dtype
            and lead.shapes == result.shapes
            and (dim >= 0 and other.ndim > 1 and all(shape[dim] == 1 for shape in other.shapes))
        ):
            result.factors = (lead, whole)
    elif len(factored) == 1 and call.name in ("mul", "multiply", "to", "_to_copy", "clone", "contiguous"):
        value = factored[0]
        assert value.factors is not None
        base, scale = value.factors
        if base.shapes == result.shapes and values.count(value) == 1:
            ref = e.replay_with(call, {**refs, id(value): base.ref})
            result.factors = (e.result(call, ref, e.sharded(result)), scale)


_LINEAR_UNARY = ("clone", "contiguous", "to", "_to_copy", "alias", "detach", "neg", "mul", "div", "lift_fresh_copy")


def _lead(e: Engine, values: list[Value]) -> tuple[Value | None, Any]:
    divided = [v for v in values if e.is_sharded(v)]
    if not divided:
        return None, None
    lead = max(divided, key=lambda v: (v.nbytes, not v.weight))
    return lead, e.sharded(lead).owners


def _align(e: Engine, value: Value, negative: int, owners: Any, origin: frozenset[str], call: Call) -> Any:
    """``value``'s local operand to go with a lead divided along dimension ``negative``."""
    place = e.place(value)
    dim = value.ndim + negative
    if isinstance(place, Sharded):
        if place.dim == dim:
            try:
                owners = e.unify(owners, place.owners)
                return value.ref, owners, origin | place.origin
            except Unproven:
                pass
        value = e.full(value, "operands divided differently")
    if dim < 0 or all(shape[dim] == 1 for shape in value.shapes):
        if isinstance(place, Undecided):
            e.commit_whole(value)
            value = e.whole_now(value)
        return e.enter(value), owners, origin
    if any(shape[dim] == 1 for shape in value.shapes):
        raise Unproven("broadcast at one size only")
    return e.part(value, dim, owners), owners, origin


def _undecided_only(e: Engine, call: Call, values: list[Value]) -> Any:
    """No operand is divided, some are undecided parameters: combine those of one shape, else settle them."""
    ndim = len(call.shapes[0])
    undecided = [v for v in values if e.undecided(v)]
    others = [v for v in values if not e.undecided(v)]
    places = [e.place(v) for v in undecided]
    tables = [p for p in places if isinstance(p, Undecided) and p.looked_up]
    if not others and not tables:
        largest = max(undecided, key=lambda v: v.nbytes)
        if largest.ndim == ndim and e.worth_dividing(largest):
            for dim in range(ndim):
                try:
                    e.divide(largest, dim)
                except Unproven:
                    continue
                return elementwise(e, call)
    for value in undecided:
        e.commit(value)
    return e.visit_again(call)


def is_pending(e: Engine, value: Any) -> bool:
    return isinstance(value, Value) and isinstance(e.place(value), Partial) and value.whole is None
