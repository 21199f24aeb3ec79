"""Sequence parallelism: what lies between two sharded regions is divided along the sequence.

Norms, dropout and residual sums are computed alike on every rank from the result of an all-reduce, and what they keep
for the backward is held by every rank in full. They treat each row alone. So the all-reduce becomes a reduce-scatter
along the dimension before the last, each rank computes its own rows, and an all-gather follows where an operation
needs them all (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022).

This is a pass over a proven program. A value is a *slice* when a rank holds its own rows of it; a value the program
has whole is cut where it meets one. Gradients: what enters a divided region (a norm's weight) sums its gradient over
ranks; a gather into a sharded region gives back a reduce-scatter; a gather for a replicated use gives back this
rank's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import runtime
from tensor_parallel.planner.program import PerRank, Program, Ref, Step, map_refs, prune
from tensor_parallel.planner.rearrange import (
    Sizes,
    drop_masks,
    enter_with_the_gather,
    is_kind,
    itself,
    sum_after_reshapes,
)
from tensor_parallel.planner.rows import treats_rows_alone
from tensor_parallel.planner.values import Sym, Value

aten = torch.ops.aten

Grad = Literal["slice", "reduce_scatter"]


@dataclass(frozen=True)
class _Slice:
    """A value of which each rank holds its rows: ``dim`` counts from the right, ``size`` is their number in all."""

    ref: Ref
    dim: int
    size: Ref
    reduced: int | None  # the all-reduce that it took the place of


class _Obstacle(Exception):
    """A pending sum was turned into rows too early."""

    def __init__(self, at: int) -> None:
        self.at = at


def divide_along_sequence(program: Program, env: Mapping[Any, Any], sizes: Sizes) -> None:
    """Rewrite ``program``, and the ``sizes`` of its collectives, in place. Raises :class:`PlanError` where no region
    can be divided."""
    drop_masks(program)
    sum_after_reshapes(program, sizes)
    choices = _Choices()
    while True:
        work = _Pass(program, env, dict(sizes), choices)
        try:
            work.run()
        except _Obstacle as obstacle:
            choices.whole_at.add(obstacle.at)
            continue
        if not work.improve():
            break
    if not any(isinstance(step.fn, runtime.ReduceScatter) for step in work.steps):
        raise PlanError("sequence parallelism: no operation between two sharded regions treats rows alone")
    program.steps, program.outputs, program.updates = work.steps, work.outputs, work.updates
    sizes.clear()
    sizes.update(work.sizes)
    prune(program)
    enter_with_the_gather(program)


@dataclass
class _Choices:
    """What an earlier attempt taught."""

    kept: set[int] = field(default_factory=set)  # all-reduces that stay: nothing uses their rows
    whole_at: set[int] = field(default_factory=set)  # additions to pending sums that take the whole
    both: set[int] = field(default_factory=set)  # slices needed whole by replicated and by sharded operations


class _Pass:
    def __init__(self, program: Program, env: Mapping[Any, Any], sizes: Sizes, choices: _Choices) -> None:
        self.program, self.sizes, self.choices = program, sizes, choices
        self.values, self.scalars = _by_reference(env)
        self.steps: list[Step] = []
        self.slices: dict[int, _Slice] = {}  # by the number of the value they are rows of
        self.early: dict[int, tuple[_Slice, int]] = {}  # pending sums that are summed already, and since when
        self.gathered: dict[tuple[int, Grad], Ref] = {}
        self.cut: dict[tuple[int, int], Ref] = {}
        self.scattered: dict[int, _Slice] = {}
        self.entered: dict[int, Ref] = {}
        self.same: dict[int, Ref] = {}
        self.used: set[int] = set()  # all-reduces whose rows were used as rows
        self.source = ""
        self.outputs: list[Any] = []
        self.updates: dict[str, Ref] = {}

    def run(self) -> None:
        for step in self.program.steps:
            self.source = step.source
            if not self._as_rows(step):
                self.steps.append(self._on_wholes(step))
        self.source = "output"
        self.outputs = map_refs(self.program.outputs, self._whole, itself)
        self.updates = {name: self._whole(ref) for name, ref in self.program.updates.items()}

    def improve(self) -> bool:
        """Learn from a finished attempt; whether another would differ."""
        idle = {s.reduced for s in self.slices.values() if s.reduced is not None} - self.used
        both = {number for number, grad in self.gathered if (number, _OTHER[grad]) in self.gathered}
        news = (idle - self.choices.kept) or (both - self.choices.both)
        self.choices.kept |= idle
        self.choices.both |= both
        return bool(news)

    # ------------------------------------------------------------------ one step
    def _on_wholes(self, step: Step) -> Step:
        args, kwargs = map_refs((step.args, step.kwargs), self._whole, itself)
        return Step(step.fn, args, kwargs, step.out, step.source)

    def _as_rows(self, step: Step) -> bool:
        """Run a step on rows, if it can be."""
        first = step.args[0] if step.args and isinstance(step.args[0], Ref) else None
        if first is None:
            return self._row_operation(step)
        if is_kind(step.fn, runtime.AllReduce):
            return self._reduce(step, first.id)
        if is_kind(step.fn, runtime.Enter) and first.id in self.slices and first.id not in self.choices.both:
            self.same[step.out] = self._gather(first.id, "reduce_scatter")
            return True
        if step.fn is runtime.add_once:
            return self._add_to_pending(step)
        if step.fn is aten.sym_size.int and first.id in self.slices:
            return self._size(step, self.slices[first.id])
        if step.fn is aten.add.Tensor and any(isinstance(a, Ref) and a.id in self.early for a in step.args):
            return self._add_pending(step)
        return self._row_operation(step)

    def _reduce(self, step: Step, pending: int) -> bool:
        if pending in self.early:
            self.slices[step.out] = self.early[pending][0]
            return True
        if step.out in self.choices.kept or step.out not in self.sizes:
            return False
        value = self.values.get(step.out)
        if value is None or value.ndim < 2:
            return False
        found = self._scatter(pending, value, step.out)
        self.slices[step.out] = found
        return True

    def _scatter(self, pending: int, value: Value, reduced: int | None) -> _Slice:
        if pending not in self.scattered:
            size = self._emit(runtime.length, Ref(pending), -2)
            ref = self._emit(runtime.ReduceScatter(-2), Ref(pending))
            origin: frozenset[str] = getattr(value.place, "origin", frozenset())
            self.sizes[ref.id] = ("reduce_scatter", value.nbytes, self.source, origin)
            self.scattered[pending] = _Slice(ref, -2, size, reduced)
        return self.scattered[pending]

    def _add_to_pending(self, step: Step) -> bool:
        """Something whole is added to a pending sum: its rows, to the rows of the sum."""
        pending, whole, alpha, _ = step.args
        if pending.id in self.early:
            rows, since = self.early[pending.id]
            addend = self._operand(whole, self.values.get(step.out), rows)
            if addend is None:
                raise _Obstacle(since)
        elif whole.id in self.slices and step.out not in self.choices.whole_at:
            value, before = self.values.get(step.out), self.values.get(pending.id)
            mine = self.slices[whole.id]
            if value is None or before is None or before.shapes != value.shapes or mine.dim != -2 or value.ndim < 2:
                return False
            rows, since = self._scatter(pending.id, value, None), step.out
            addend = self._operand(whole, value, rows)
            if addend is None:
                return False
        else:
            return False
        ref = self._emit(torch.add, rows.ref, addend, alpha=alpha)
        self.early[step.out] = (_Slice(ref, rows.dim, rows.size, None), since)
        return True

    def _add_pending(self, step: Step) -> bool:
        """Two pending sums, one of which is summed already."""
        since = next(self.early[a.id][1] for a in step.args if isinstance(a, Ref) and a.id in self.early)
        value, parts = self.values.get(step.out), []
        if value is None or step.kwargs:
            raise _Obstacle(since)
        for arg in step.args:
            operand = self.values.get(arg.id) if isinstance(arg, Ref) else None
            if operand is None or operand.shapes != value.shapes:
                raise _Obstacle(since)
            parts.append(self.early[arg.id][0] if arg.id in self.early else self._scatter(arg.id, value, None))
        ref = self._emit(torch.add, parts[0].ref, parts[1].ref)
        self.early[step.out] = (_Slice(ref, -2, parts[0].size, None), since)
        return True

    def _size(self, step: Step, rows: _Slice) -> bool:
        value = self.values[step.args[0].id]
        if step.args[1] % value.ndim == value.ndim + rows.dim:
            self.same[step.out] = rows.size
        else:
            self.same[step.out] = self._emit(runtime.length, rows.ref, step.args[1] % value.ndim - value.ndim)
        return True

    def _row_operation(self, step: Step) -> bool:
        """An operation that treats each row alone, with rows among its operands."""
        refs = [a for a in (*step.args, *step.kwargs.values()) if isinstance(a, Ref)]
        rows = next((self.slices[ref.id] for ref in refs if ref.id in self.slices), None)
        result = self.values.get(step.out)
        if rows is None or result is None or not treats_rows_alone(step, rows.dim, result.ndim):
            return False
        made: dict[int, Ref] = {}
        for ref in refs:
            operand = self._operand(ref, result, rows, trial=True)
            if operand is None:
                return False
        for ref in refs:
            made[ref.id] = self._operand(ref, result, rows) or ref
        args, kwargs = map_refs((step.args, step.kwargs), lambda ref: made[ref.id], itself)
        if runtime.is_random(step):
            out = self._emit(
                runtime.with_rank_seed, step.fn, PerRank(tuple(range(self.program.ranks))), *args, **kwargs
            )
        else:
            out = self._emit(step.fn, *args, **kwargs)
        self.slices[step.out] = _Slice(out, rows.dim, rows.size, None)
        return True

    # ------------------------------------------------------------------ operands
    def _operand(self, ref: Ref, result: Value | None, rows: _Slice, trial: bool = False) -> Ref | None:
        """``ref`` to go with ``rows`` into ``result``; None when it cannot. With ``trial`` nothing is emitted."""
        if ref.id in self.scalars or ref.id in self.same:
            return self.same.get(ref.id, ref)
        value = self.values.get(ref.id)
        if value is None or result is None or ref.id in self.early:
            return None
        dim = value.ndim + rows.dim
        single = dim < 0 or all(shape[dim] == 1 for shape in value.shapes)
        wide = [shape[result.ndim + rows.dim] for shape in result.shapes]
        if ref.id in self.slices:
            mine = self.slices[ref.id]
            if mine.dim != rows.dim or [shape[dim] for shape in value.shapes] != wide:
                return None
            if not trial and mine.reduced is not None:
                self.used.add(mine.reduced)
            return mine.ref
        if not single and [shape[dim] for shape in value.shapes] != wide:
            return None
        if trial:
            return ref
        return self._enter(ref, value) if single else self._cut(ref, rows.dim)

    def _enter(self, ref: Ref, value: Value) -> Ref:
        if not value.grad:
            return ref
        if ref.id not in self.entered:
            self.entered[ref.id] = self._emit(runtime.Enter(), ref)
        return self.entered[ref.id]

    def _cut(self, ref: Ref, dim: int) -> Ref:
        if (ref.id, dim) not in self.cut:
            self.cut[ref.id, dim] = self._emit(runtime.TakeRows(dim), ref)
        return self.cut[ref.id, dim]

    def _whole(self, ref: Ref) -> Ref:
        if ref.id in self.early:
            raise _Obstacle(self.early[ref.id][1])
        if ref.id in self.slices:
            return self._gather(ref.id, "slice")
        return self.same.get(ref.id, ref)

    def _gather(self, number: int, grad: Grad) -> Ref:
        if (number, grad) not in self.gathered:
            rows, value = self.slices[number], self.values[number]
            ref = self._emit(runtime.GatherRows(rows.dim, grad), rows.ref, rows.size)
            self.sizes[ref.id] = ("all_gather", value.nbytes, self.source, frozenset())
            self.gathered[number, grad] = ref
        return self.gathered[number, grad]

    def _emit(self, fn: Any, *args: Any, **kwargs: Any) -> Ref:
        out = self.program.new_id()
        self.steps.append(Step(fn, args, kwargs, out, self.source))
        return Ref(out)


_OTHER: dict[Grad, Grad] = {"slice": "reduce_scatter", "reduce_scatter": "slice"}


def _by_reference(env: Mapping[Any, Any]) -> tuple[dict[int, Value], set[int]]:
    """What the program's references stand for: tensors, and the numbers of scalars."""
    values: dict[int, Value] = {}
    scalars: set[int] = set()
    for item in env.values():
        for value in item if isinstance(item, (list, tuple)) else (item,):
            if isinstance(value, Sym) and value.ref is not None:
                scalars.add(value.ref.id)
            while isinstance(value, Value):
                if value.ref is not None:
                    values[value.ref.id] = value
                value = value.whole
    return values, scalars
