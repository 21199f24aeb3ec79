"""What a program's steps call, by name: registered operators, collectives, and functions of a short list."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from tensor_parallel.errors import NotPortable
from tensor_parallel.planner import runtime

_COLLECTIVES = {
    cls.__name__: cls
    for cls in (
        runtime.AllReduce,
        runtime.AllGather,
        runtime.ReduceScatter,
        runtime.GatherRows,
        runtime.TakeRows,
        runtime.Enter,
        runtime.Leave,
        runtime.Shared,
    )
}
_OURS = ("tensor_parallel.planner.runtime", "tensor_parallel.planner.rules.")
_OPERATOR = ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "not_", "and_", "or_")
_COMPARISON = ("eq", "ne", "lt", "le", "gt", "ge")
_TORCH = ("add", "sub", "mul", "div", "abs", "square", "sqrt", "rsqrt", "cat")
_SIZES = ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not")
_LIBRARY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "operator": (operator, _OPERATOR + _COMPARISON),
    "torch": (torch, _TORCH + _SIZES),
}
"""Modules by name, and what of them may be called."""
_NAMESPACES = ("aten", "prims", "transformers", "torchvision")
_REFUSED = ("aten.from_file",)
"""Operators that reach beyond their arguments."""


def dump(fn: Any, value: Callable[[Any], Any]) -> list[Any]:
    """Kind and name; ``value`` writes the fields of a collective. Raises :class:`NotPortable`."""
    if isinstance(fn, torch._ops.OpOverload):
        if not _is_harmless(fn):
            raise NotPortable(f"{fn} is not handed on")
        return ["operator", str(fn)]
    if type(fn) in _COLLECTIVES.values():
        return ["collective", type(fn).__name__, [value(getattr(fn, field.name)) for field in fields(fn)]]
    known = str(getattr(fn, "__name__", ""))
    ours = isinstance(fn, types.FunctionType) and fn.__module__.startswith(_OURS)
    if ours and getattr(sys.modules[fn.__module__], known, None) is fn:
        return ["own", fn.__module__, known]
    for name, (module, allowed) in _LIBRARY.items():
        if known in allowed and getattr(module, known) is fn:
            return ["library", name, known]
    raise NotPortable(f"{fn!r} has no name by which another process would know it")


def load(data: list[Any], value: Callable[[Any], Any]) -> Any:
    """What :func:`dump` was given. Raises AttributeError, LookupError, TypeError or ValueError."""
    kind, name, *rest = data
    if kind == "operator":
        return _operator(name)
    if kind == "collective":
        return _COLLECTIVES[name](*map(value, rest[0]))
    if kind == "own" and name.startswith(_OURS):
        found = getattr(sys.modules[name], rest[0])
        if isinstance(found, types.FunctionType) and found.__module__ == name:
            return found
    if kind == "library":
        module, allowed = _LIBRARY[name]
        if rest[0] in allowed:
            return getattr(module, rest[0])
    raise ValueError(f"a program may not call {data!r}")


def _operator(text: str) -> torch._ops.OpOverload:
    """Registered with torch, here as there."""
    namespace, name, overload = text.split(".")
    if namespace not in _NAMESPACES:
        raise ValueError(f"{text} is not handed on")
    found: Any = torch.ops
    for part, expected in (
        (namespace, torch._ops._OpNamespace),
        (name, torch._ops.OpOverloadPacket),
        (overload, torch._ops.OpOverload),
    ):
        found = getattr(found, part)
        if not isinstance(found, expected):
            raise ValueError(f"{text} is no operator")
    result: torch._ops.OpOverload = found
    if not _is_harmless(result):
        raise ValueError(f"{text} is not handed on")
    return result


def _is_harmless(op: torch._ops.OpOverload) -> bool:
    """Whether it is one of those that make values of values."""
    writes = op._schema.is_mutable and op is not torch.ops.aten.copy_.default
    return op.namespace in _NAMESPACES and not writes and not str(op).startswith(_REFUSED)
