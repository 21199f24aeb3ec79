"""Conditions on input sizes under which an exported graph is right, parsed into data and evaluated here, never as code.

torch writes them as Python over ``L['name'].size()[dim]``. A graph may have been simplified on their strength, so
one that cannot be parsed refuses the archive instead of being dropped.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensor_parallel.errors import CheckpointError

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Div: operator.truediv, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "Max": max, "Min": min, "Mod": operator.mod, "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv, "CeilDiv": lambda a, b: -(-a // b), "Eq": operator.eq, "Ne": operator.ne,
}  # fmt: skip
_MAX_GUARD = 4096

Sizes = Mapping[str, Sequence[int]]
_Term = Callable[[Sizes], Any]


@dataclass(frozen=True)
class Guard:
    """A condition on the shapes of the inputs; ``text`` is as torch wrote it, for messages."""

    text: str
    _holds: _Term

    def holds(self, sizes: Sizes) -> bool:
        """Whether inputs of these shapes meet it."""
        try:
            return bool(self._holds(sizes))
        except (ZeroDivisionError, IndexError):
            return False


def parse_guard(text: str, inputs: Mapping[str, str], ranks: Mapping[str, int]) -> Guard:
    """Raises :class:`CheckpointError` for a condition on anything but sizes of inputs.

    ``inputs`` maps the names torch may use for an input (``L['x']``, ``L['flat_args'][0]``) to the input's own name;
    ``ranks`` is each one's number of dimensions.
    """
    try:
        if len(text) > _MAX_GUARD:
            raise _Unknown
        return Guard(text, _term(ast.parse(text.strip(), mode="eval").body, inputs, ranks))
    except (SyntaxError, ValueError, RecursionError, MemoryError, _Unknown):
        raise CheckpointError(
            f"the program has a guard that is not about sizes of its inputs: {text[:120]!r}"
        ) from None


class _Unknown(Exception):
    pass


def _term(node: ast.expr, inputs: Mapping[str, str], ranks: Mapping[str, int]) -> _Term:
    def sub(child: ast.expr) -> _Term:
        return _term(child, inputs, ranks)

    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return lambda sizes: value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = sub(operand)
            return lambda sizes: -inner(sizes)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = sub(operand)
            return lambda sizes: not inner(sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b, apply = sub(left), sub(right), _BINARY[type(op)]
            return lambda sizes: apply(a(sizes), b(sizes))
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _BINARY for op in ops):
            terms = [sub(part) for part in (left, *others)]
            return lambda sizes: all(
                _BINARY[type(op)](terms[i](sizes), terms[i + 1](sizes)) for i, op in enumerate(ops)
            )
        case ast.BoolOp(op=combiner, values=values):
            parts = [sub(value) for value in values]
            combine = all if isinstance(combiner, ast.And) else any
            return lambda sizes: combine(part(sizes) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            given, call = [sub(arg) for arg in args], _CALLS[name]
            return lambda sizes: call(*(term(sizes) for term in given))
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=source, attr="size"), args=[], keywords=[]), slice=index
        ):
            return _size(source, index, inputs, ranks)
        case ast.Subscript(value=ast.Attribute(value=source, attr="shape"), slice=index):
            return _size(source, index, inputs, ranks)
    raise _Unknown


def _size(source: ast.expr, index: ast.expr, inputs: Mapping[str, str], ranks: Mapping[str, int]) -> _Term:
    name = inputs.get(ast.unparse(source))
    if (
        name is None
        or not isinstance(index, ast.Constant)
        or type(index.value) is not int
        or not 0 <= index.value < ranks[name]
    ):
        raise _Unknown
    dim = index.value
    return lambda sizes: sizes[name][dim]
