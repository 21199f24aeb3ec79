"""Expressions of free sizes as plain values, and back: heads by name, out of sympy's and torch's own."""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy
from torch.utils._sympy import functions

from tensor_parallel.errors import NotPortable

_HEADS = (
    sympy.Add,
    sympy.Mul,
    sympy.Pow,
    sympy.Eq,
    sympy.Ne,
    sympy.Lt,
    sympy.Le,
    sympy.Gt,
    sympy.Ge,
    sympy.And,
    sympy.Or,
    sympy.Not,
)


_MOST, _MOST_POWER = 2**64, 16


@cache
def _heads() -> dict[str, type[sympy.Basic]]:
    """By name; torch's ``Mod``, ``Max`` and ``Min`` are not sympy's."""
    ours = {name: cls for name, cls in vars(functions).items() if isinstance(cls, type) and issubclass(cls, sympy.Expr)}
    return {head.__name__: head for head in _HEADS} | {
        name: cls for name, cls in ours.items() if cls.__module__ == functions.__name__
    }


def dump(expression: Any) -> Any:
    """A number as it is, a symbol as its name, anything else as its head and arguments. Raises :class:`NotPortable`."""
    if isinstance(expression, (bool, int)):
        return expression
    if isinstance(expression, sympy.Symbol):
        return {"symbol": [expression.name, expression.is_integer, expression.is_positive, expression.is_nonnegative]}
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Rational):
        return {"rational": [int(expression.p), int(expression.q)]}
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    head = type(expression).__name__
    if _heads().get(head) is not type(expression):
        raise NotPortable(f"a size depends on {head}")
    return [head, *map(dump, expression.args)]


def load(data: Any) -> Any:
    """What :func:`dump` was given; numbers alone as ``int``. Raises LookupError, TypeError or ValueError."""
    return data if isinstance(data, int) else _load(data)


def _load(data: Any) -> Any:
    if isinstance(data, bool):
        return sympy.true if data else sympy.false
    if isinstance(data, int):
        return _bounded(sympy.Integer(data))
    if isinstance(data, dict):
        [(kind, content)] = data.items()
        return _symbol(*content) if kind == "symbol" else sympy.Rational(*map(int, content))
    head, *arguments = data
    loaded = [_load(argument) for argument in arguments]
    if head == "Pow" and not (loaded[1].is_Rational and abs(loaded[1]) <= _MOST_POWER):
        raise ValueError("no size has such a power")
    return _bounded(_heads()[head](*loaded))


def _bounded(value: Any) -> Any:
    """``value``, unless it is a number that sizes never have: to compute with those may take for ever."""
    if isinstance(value, sympy.Number) and not abs(value) < _MOST:
        raise ValueError("no size is as large as that")
    return value


def _symbol(name: str, integer: bool | None, positive: bool | None, nonnegative: bool | None) -> sympy.Symbol:
    known = {"integer": integer, "positive": positive, "nonnegative": nonnegative}
    return sympy.Symbol(name, **{key: value for key, value in known.items() if value is not None})
