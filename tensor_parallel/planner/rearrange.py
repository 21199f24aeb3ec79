"""Small rearrangements of a program that let more of it be divided along the sequence, each of which keeps its results:
dropout without its mask, sums over ranks after reshapes, gathers that give back a reduce-scatter."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch

from tensor_parallel.planner import runtime
from tensor_parallel.planner.program import PerRank, Program, Ref, Step, map_refs, refs_in

aten = torch.ops.aten

Sizes = dict[int, tuple[str, int, str, frozenset[str]]]
"""By step result: a collective's kind, bytes, the operation that asked for it, and the weights behind it."""


def drop_masks(program: Program) -> None:
    """Dropout as an operation of one result: traced for training it gives its mask too, which no step reads."""
    users = _users(program)
    replaced: dict[int, Step | None] = {}
    for step in program.steps:
        if step.fn is aten.native_dropout.default and not step.kwargs:
            kept = users[step.out]
            if len(kept) == 1 and kept[0].fn is operator.getitem and kept[0].args[1] == 0:
                replaced[step.out] = None
                replaced[kept[0].out] = Step(runtime.dropout, step.args, {}, kept[0].out, step.source)
    steps = (replaced.get(step.out, step) for step in program.steps)
    program.steps = [step for step in steps if step is not None]


def sum_after_reshapes(program: Program, sizes: Sizes) -> None:
    """A sum over ranks that is only reshaped is taken after that: its rows are then those of what follows."""
    users = _users(program)
    waiting: dict[int, Step] = {}  # by the number of the sum that one reshape alone reads
    steps: list[Step] = []
    for step in program.steps:
        first = step.args[0] if step.args else None
        if isinstance(first, Ref) and first.id in waiting:
            reduce = waiting.pop(first.id)
            fn = aten.reshape.default if step.fn in _VIEWS else step.fn
            moved = Ref(program.new_id())
            steps.append(Step(fn, (reduce.args[0], *step.args[1:]), step.kwargs, moved.id, step.source))
            sizes[step.out] = sizes.pop(reduce.out)
            step = Step(reduce.fn, (moved,), {}, step.out, step.source)
        only = users[step.out][0] if len(users[step.out]) == 1 else _END
        reshaped = only.fn in _RESHAPES and _reads_only(only, step.out)
        if reshaped and is_kind(step.fn, runtime.AllReduce) and step.out in sizes:
            waiting[step.out] = step
        else:
            steps.append(step)
    program.steps = steps


_VIEWS = (aten.view.default, aten._unsafe_view.default)
_RESHAPES = (*_VIEWS, aten.reshape.default)


def _users(program: Program) -> dict[int, list[Step]]:
    """Who reads each value; what the program returns is read by ``_END``."""
    users: dict[int, list[Step]] = defaultdict(list)
    for step in program.steps:
        for number in refs_in(step):
            users[number].append(step)
    map_refs((program.outputs, program.updates), lambda ref: users[ref.id].append(_END), itself)
    return users


def enter_with_the_gather(program: Program) -> None:
    """A gather whose result enters a sharded region after some reshaping gives back a reduce-scatter: the sum over
    ranks of gradients may be taken before or after an operation's backward."""
    users = _users(program)
    replaced: dict[int, Step] = {}
    for step in program.steps:
        if isinstance(step.fn, runtime.GatherRows) and step.fn.grad == "slice":
            last = step
            while len(users[last.out]) == 1 and _reads_only(users[last.out][0], last.out):
                last = users[last.out][0]
                if is_kind(last.fn, runtime.Enter):
                    fn = runtime.GatherRows(step.fn.dim, "reduce_scatter")
                    replaced[step.out] = Step(fn, step.args, step.kwargs, step.out, step.source)
                    replaced[last.out] = Step(aten.alias.default, last.args, {}, last.out, last.source)
                    break
    program.steps = [replaced.get(step.out, step) for step in program.steps]


_END = Step(None, (), {}, -1, "output")  # type: ignore[arg-type]


def _reads_only(step: Step, number: int) -> bool:
    """Whether an operation's only tensor is ``number``; sizes may come from elsewhere."""
    if is_kind(step.fn, runtime.Enter):
        return True
    schema = getattr(step.fn, "_schema", None)
    if schema is None or hasattr(step.fn, "simulate") or runtime.is_random(step):
        return False
    tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
    first = step.args[0] if step.args else None
    return len(tensors) == 1 and isinstance(first, Ref) and first.id == number


def is_kind(fn: Any, kind: type) -> bool:
    """Whether a step is of this kind, and of no kind derived from it."""
    return type(fn) is kind


def itself(constant: PerRank) -> PerRank:
    return constant
