"""The only texts of an exported program that are let through to code that evaluates or generates code.

torch gives symbolic expressions to ``sympy.sympify``, which is ``eval``; writes node and attribute names into
Python source that it then executes; resolves operator names by attribute access from the ``torch`` module, where
there is much besides operators; and runs guards as code. Each such text must match a grammar that can express sizes
and operators and nothing else.
"""

from __future__ import annotations

import ast
import keyword
import operator
import re
from typing import Any

import torch

from tensor_parallel.errors import CheckpointError

MAX_EXPRESSION = 10_000
_MAX_INTEGER = 1 << 63
_MAX_EXPONENT = 64

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,9}")
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
_HIGHER_ORDER = re.compile(r"torch\.ops\.higher_order\.([a-z_]+)")

# Higher-order operators that only run graphs of the program itself.
_GRAPH_RUNNERS = frozenset({
    "cond", "while_loop", "map_impl", "scan", "associative_scan", "wrap_with_set_grad_enabled", "wrap_with_autocast",
    "hints_wrapper", "tag_activation_checkpoint", "checkpoint",
})  # fmt: skip
_EXPERTS = "torch.ops.transformers.grouped_mm_fallback.default"
_FORBIDDEN_OPERATORS = frozenset({"from_file"})  # opens, and can create, any file it is given the name of

_FUNCTIONS = frozenset({
    "Integer", "Float", "Rational", "Add", "Mul", "Mod", "Max", "Min", "Abs", "floor", "ceiling", "Eq", "Ne", "Lt",
    "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
    "And", "Or", "Not", "Piecewise", "ExprCondPair", "FloorDiv", "ModularIndexing", "Where", "PythonMod",
    "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "FloatTrueDiv", "IntTrueDiv",
    "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat",
    "Identity",
})  # fmt: skip
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_CONSTANTS = frozenset({"true", "false", "oo", "int_oo"})
_OPERATIONS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub, ast.UAdd, ast.Not, ast.And, ast.Or,
    ast.BitAnd, ast.BitOr, ast.Invert, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip


def check_identifier(name: Any, what: str) -> str:
    """A name that becomes part of generated source: a Python identifier and no keyword."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or len(name) > 4096 or keyword.iskeyword(name):
        raise CheckpointError(f"{what} {_short(name)} is not a plain name")
    return name


def check_tensor_name(name: Any, what: str) -> str:
    """A qualified name of a parameter or buffer: letters, digits and underscores, joined by dots."""
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name) or len(name) > 4096:
        raise CheckpointError(f"{what} {_short(name)} is not a plain dotted name")
    return name


def check_operator(target: Any) -> None:
    """An operator of the dispatcher, a symbolic-size operator, or a higher-order operator that runs the program's
    own graphs.
    """
    if not isinstance(target, str) or not (
        _is_dispatched(target) or _is_graph_runner(target) or _is_size_operator(target)
    ):
        raise CheckpointError(f"operator {_short(target)} is not one that an exported program may call here")


def check_expression(text: Any) -> None:
    """A symbolic size such as ``Mul(Integer(8), Symbol('s0', integer=True, positive=True))`` or ``s0 + 1``."""
    if not isinstance(text, str) or len(text) > MAX_EXPRESSION:
        raise CheckpointError(f"symbolic expression {_short(text)} is too long or no text")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        _check(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError, _Refused):
        raise CheckpointError(f"symbolic expression {_short(text)} is not one of sizes") from None


class _Refused(Exception):
    pass


def _check(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=bool()):
            return
        case ast.Constant(value=int(number)) if abs(number) < _MAX_INTEGER:
            return
        case ast.Constant(value=float()):
            return
        case ast.Name(id=name) if _SYMBOL.fullmatch(name) or name in _CONSTANTS:
            return
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _OPERATIONS):
            _check(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            _check_power(left, right)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATIONS):
            _check(left)
            _check(right)
        case ast.BoolOp(values=values) | ast.Tuple(elts=values):
            for value in values:
                _check(value)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _OPERATIONS) for op in ops):
            for value in (left, *others):
                _check(value)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords) if (
            _SYMBOL.fullmatch(name)
        ):
            _check_keywords(keywords)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=keywords):
            if not re.fullmatch(r"-?[0-9.e+-]{1,40}", digits):
                raise _Refused
            _check_keywords(keywords)
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _POWERS:
            _check_power(left, right)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _FUNCTIONS:
            _check_keywords(keywords)
            for value in args:
                _check(value)
        case _:
            raise _Refused


def _check_power(base: ast.expr, exponent: ast.expr) -> None:
    """Only small constant exponents, and no power of a power: ``9**9**9`` would take all memory."""
    if any(isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow) for part in ast.walk(base)):
        raise _Refused
    if any(isinstance(part, ast.Name) and part.id in _POWERS for part in ast.walk(base)):
        raise _Refused
    value = exponent.args[0] if isinstance(exponent, ast.Call) and len(exponent.args) == 1 else exponent
    magnitude = value.operand if isinstance(value, ast.UnaryOp) else value
    number = magnitude.value if isinstance(magnitude, ast.Constant) else None
    if not isinstance(number, int | float) or abs(number) > _MAX_EXPONENT:
        raise _Refused
    _check(base)
    _check(exponent)


def _check_keywords(keywords: list[ast.keyword]) -> None:
    for given in keywords:
        value = given.value
        small = isinstance(value, ast.Constant) and (
            isinstance(value.value, bool) or (type(value.value) is int and 0 <= value.value <= 400)
        )
        if given.arg is None or not re.fullmatch(r"[a-z_]{1,24}", given.arg) or not small:
            raise _Refused


def _is_dispatched(target: str) -> bool:
    if target == _EXPERTS:
        return _has_experts()
    matched = _OPERATOR.fullmatch(target)
    if not matched or matched[2] in _FORBIDDEN_OPERATORS:
        return False
    name, overload = f"{matched[1]}::{matched[2]}", matched[3]
    registered = torch._C._dispatch_has_kernel(name if overload == "default" else f"{name}.{overload}")
    return bool(registered)  # operators of TorchScript alone (aten::save writes files) are not in the dispatcher


def _has_experts() -> bool:
    """Whether the one operator that ``transformers`` itself defines, for layers of experts, is there."""
    try:
        import transformers.integrations.moe  # noqa: F401
    except ImportError:
        return False
    return bool(torch._C._dispatch_has_kernel("transformers::grouped_mm_fallback"))


def _is_graph_runner(target: str) -> bool:
    matched = _HIGHER_ORDER.fullmatch(target)
    return matched is not None and matched[1] in _GRAPH_RUNNERS


def _is_size_operator(target: str) -> bool:
    from torch._export.serde.serialize import _SYM_OPS

    module, _, name = target.partition(".")
    namespace = {"_operator": operator, "math": __import__("math"), "torch": torch}.get(module)
    found = getattr(namespace, name, None) if namespace is not None and _IDENTIFIER.fullmatch(name) else None
    return found is not None and (found is operator.getitem or any(found is one for one in _SYM_OPS))


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
