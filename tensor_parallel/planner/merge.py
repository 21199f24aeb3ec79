"""All-reduces that need not wait for one another become one.

A collective's cost is mostly latency, so the number that counts is the longest chain of all-reduces in which each needs
the one before. Every all-reduce gets a *round*: one more than the latest round its payload depends on. Those of one
round and type are packed into one payload: the statistics of queries and keys, the sums of two towers, a decoder's
first layer beside its encoder's.

A pending sum is linear, so what scales it or adds to it may happen after the sum as well. Where that lets an all-reduce
join an earlier round it is moved: ``sum(p * r)`` waits for the statistics ``r``, ``sum(p) * r`` travels with them.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tensor_parallel.planner import runtime
from tensor_parallel.planner.program import Program, Ref, Step, map_refs, prune, refs_in

LIMIT = 1 << 18  # bytes at the example's sizes: packing a larger payload would cost more than the latency it saves


@dataclass(frozen=True)
class Payload:
    """What one all-reduce sums, and for whom."""

    nbytes: int
    dtype: torch.dtype
    where: str
    origin: frozenset[str]


@dataclass
class _Pass:
    program: Program
    pending: Mapping[int, tuple[int, torch.dtype]]  # pending sums by number: bytes and type
    payloads: dict[int, Payload]  # by the number of the all-reduce's result
    producer: dict[int, Step] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)  # of every value
    steps: list[Step] = field(default_factory=list)
    after: dict[int, int] = field(default_factory=dict)  # random operations keep their order
    last_random: int | None = None

    def add(self, step: Step, at: int | None = None) -> None:
        """Append a step; ``at`` is the round of an all-reduce."""
        wanted = refs_in(step)
        if runtime.is_random(step):
            if self.last_random is not None:
                self.after[step.out] = self.last_random
                wanted.append(self.last_random)
            self.last_random = step.out
        before = max((self.rounds.get(number, 0) for number in wanted), default=0)
        self.rounds[step.out] = before if at is None else at
        self.producer[step.out] = step
        self.steps.append(step)


def merge_all_reduces(
    program: Program, pending: Mapping[int, tuple[int, torch.dtype]], payloads: Mapping[int, Payload]
) -> dict[int, Payload]:
    """Rewrite ``program`` in place; the all-reduces it has now, by the number of their result."""
    work = _Pass(program, pending, dict(payloads))
    for step in program.steps:
        if isinstance(step.fn, runtime.AllReduce) and step.out in work.payloads:
            _advance(work, step)
        else:
            work.add(step)
    program.steps = work.steps
    prune(program)
    groups = _groups(work)
    if any(len(group) > 1 for group in groups):
        _emit_together(work, groups)
    left = {step.out for step in program.steps}
    return {number: payload for number, payload in work.payloads.items() if number in left}


# ------------------------------------------------------------------------------------------------- an earlier round
def _advance(work: _Pass, step: Step) -> None:
    """Add an all-reduce: before the linear operations of its payload where that is a round earlier."""
    source = step.args[0]
    latest = work.rounds.get(source.id, 0)
    leaves = _leaves(work, source.id, latest) if latest > 0 and work.payloads[step.out].nbytes <= LIMIT else None
    if not leaves or source.id in leaves:
        work.add(step, latest + 1)
        return
    payload = work.payloads.pop(step.out)
    summed: dict[int, Ref] = {}
    for leaf in leaves:
        out = work.program.new_id()
        work.add(Step(step.fn, (Ref(leaf),), {}, out, step.source), latest)
        nbytes, dtype = work.pending[leaf]
        work.payloads[out] = Payload(nbytes, dtype, payload.where, payload.origin)
        summed[leaf] = Ref(out)
    _again(work, source.id, summed, step.out)


def _leaves(work: _Pass, number: int, latest: int) -> list[int] | None:
    """The pending sums known before round ``latest`` from which ``number`` is made by linear operations."""
    if number not in work.pending:
        return None
    if work.rounds.get(number, 0) < latest:
        return [number]
    step = work.producer.get(number)
    if step is None:
        return None
    found: list[int] = []
    for operand in _pending_operands(work, step):
        more = _leaves(work, operand, latest)
        if more is None:
            return None
        found.extend(leaf for leaf in more if leaf not in found)
    return found or None


def _pending_operands(work: _Pass, step: Step) -> list[int]:
    """The pending sums among the operands of an operation that is linear in them; none for any other operation."""
    if step.fn is runtime.add_once:
        return [step.args[0].id]
    if step.fn in (torch.ops.aten.mul.Tensor, torch.mul):
        found = [a.id for a in step.args if isinstance(a, Ref) and a.id in work.pending]
        return found if len(found) == 1 else []
    if step.fn is torch.ops.aten.add.Tensor and not step.kwargs:
        found = [a.id for a in step.args if isinstance(a, Ref) and a.id in work.pending]
        return found if len(found) == 2 else []
    return []


def _again(work: _Pass, number: int, summed: Mapping[int, Ref], out: int) -> Ref:
    """The operations between the leaves and ``number`` once more, on sums."""
    if number in summed:
        return summed[number]
    step = work.producer[number]
    operands = _pending_operands(work, step)

    def whole(ref: Ref) -> Ref:
        if ref.id in operands:
            return _again(work, ref.id, summed, work.program.new_id())
        maker = work.producer.get(ref.id)
        # Whole values meet whole values now: nothing enters a divided computation.
        return maker.args[0] if maker is not None and getattr(maker.fn, "kind", "") == runtime.Enter.kind else ref

    if step.fn is runtime.add_once:
        pending, other, alpha, _ = step.args
        work.add(Step(torch.add, (whole(pending), whole(other)), {"alpha": alpha}, out, step.source))
    else:
        args = map_refs(step.args, whole, lambda constant: constant)
        work.add(Step(step.fn, args, step.kwargs, out, step.source))
    return Ref(out)


# ------------------------------------------------------------------------------------------------- one payload
def _groups(work: _Pass) -> list[list[Step]]:
    """All-reduces to be done as one, in order of their first."""
    found: dict[object, list[Step]] = defaultdict(list)
    for step in work.program.steps:
        payload = work.payloads.get(step.out)
        if payload is not None:
            alone = step.out if payload.nbytes > LIMIT else None
            found[work.rounds[step.out], payload.dtype, alone].append(step)
    return list(found.values())


def _emit_together(work: _Pass, groups: list[list[Step]]) -> None:
    """The steps in an order that has every member's operand ready when the first member of a group runs."""
    group_of = {step.out: group for group in groups if len(group) > 1 for step in group}
    order: list[Step] = []
    done: set[int] = set()
    made = {step.out: step for step in work.program.steps}

    def needs(step: Step) -> list[int]:
        wanted = refs_in(step)
        for member in group_of.get(step.out, ()):
            wanted.extend(refs_in(member))
        if step.out in work.after:
            wanted.append(work.after[step.out])
        return [number for number in wanted if number in made and number not in done]

    for first in work.program.steps:
        stack = [first]
        while stack:
            step = stack[-1]
            if step.out in done:
                stack.pop()
                continue
            missing = needs(step)
            if missing:
                stack.extend(made[number] for number in reversed(missing))
                continue
            stack.pop()
            group = group_of.get(step.out)
            if group is None:
                order.append(step)
                done.add(step.out)
            else:
                order.extend(_packed(work, group))
                done.update(member.out for member in group)
    work.program.steps = order


def _packed(work: _Pass, group: list[Step]) -> list[Step]:
    program, payloads = work.program, [work.payloads.pop(step.out) for step in group]
    values = [step.args[0] for step in group]
    source = group[0].source
    flat, total, parts = program.new_id(), program.new_id(), program.new_id()
    work.payloads[total] = Payload(
        sum(p.nbytes for p in payloads),
        payloads[0].dtype,
        payloads[0].where,
        frozenset().union(*(p.origin for p in payloads)),
    )
    return [
        Step(runtime.pack, (values,), {}, flat, source),
        Step(group[0].fn, (Ref(flat),), {}, total, source),
        Step(runtime.unpack, (Ref(total), values), {}, parts, source),
        *(Step(operator.getitem, (Ref(parts), i), {}, step.out, step.source) for i, step in enumerate(group)),
    ]
