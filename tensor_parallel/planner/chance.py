"""What depends on chance, made certain, so that two computations can be compared: dropout drops nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensor_parallel.planner import runtime
from tensor_parallel.planner.program import Program, Step

aten = torch.ops.aten

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def without_dropout(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call:
    """The call with nothing dropped; any other call as it is."""
    schema = getattr(fn, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else ""
    if name in _DROPOUTS or fn is runtime.dropout:
        return aten.alias.default, (args[0],), {}
    if name == "native_dropout":
        return _keep_all, (args[0],), {}
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if "dropout_p" in names:
        at = names.index("dropout_p")
        if at < len(args):
            return fn, (*args[:at], 0.0, *args[at + 1 :]), kwargs
        return fn, tuple(args), {**kwargs, "dropout_p": 0.0}
    return fn, tuple(args), kwargs


def _keep_all(value: Tensor) -> tuple[Tensor, Tensor]:
    return value, torch.ones_like(value, dtype=torch.bool)


def certain(program: Program) -> Program | None:
    """The program with nothing dropped; None where ranks draw other numbers of their own, which no other computation
    repeats."""
    steps = []
    for step in program.steps:
        fn, args = step.fn, step.args
        if fn is runtime.with_rank_seed:
            fn, args = args[0], args[2:]
        made, new_args, kwargs = without_dropout(fn, args, step.kwargs)
        new = Step(made, new_args, kwargs, step.out, step.source)
        if step.fn is runtime.with_rank_seed and runtime.is_random(new):
            return None
        steps.append(new)
    return replace(program, steps=steps)
