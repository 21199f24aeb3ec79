"""Proving: run the rules on ranks, check every step, and write the program that all ranks will execute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import runtime
from tensor_parallel.planner.engine import Engine, Gathered
from tensor_parallel.planner.merge import Payload, merge_all_reduces
from tensor_parallel.planner.placement import (
    ALL,
    PARTIAL,
    REPLICATED,
    Owners,
    Partial,
    Pattern,
    Place,
    Sharded,
    Unproven,
    counts,
    is_contiguous,
    is_mixed,
    pattern,
    positions,
    same,
)
from tensor_parallel.planner.program import PerRank, Program, Ref, Step, map_refs, prune
from tensor_parallel.planner.rules import PARTIAL_RULES, RULES
from tensor_parallel.planner.sequence import divide_along_sequence
from tensor_parallel.planner.solver import Division
from tensor_parallel.planner.tensors import Tensors, differentiable
from tensor_parallel.planner.traced import Traced
from tensor_parallel.planner.values import Call, Sym, Value, map_values

OUTPUT = "output"


@dataclass(frozen=True)
class Communication:
    """One collective of a program: its kind, payload at the example's sizes, and the operation that asked for it."""

    kind: str
    nbytes: int
    step: int
    where: str
    origin: frozenset[str]


class Prover(Engine):
    def __init__(
        self,
        traced: Traced,
        tensors: Tensors,
        ranks: int,
        divisions: Mapping[str, Division],
        stored: frozenset[str] = frozenset(),
        gather_after: frozenset[str] = frozenset(),
        gather_outputs: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(traced, ranks, len(traced.assignments), RULES, PARTIAL_RULES)
        self.tensors, self.divisions, self.stored_names, self.gather_outputs = (
            tensors,
            divisions,
            stored,
            gather_outputs,
        )
        self.gather_after, self.sequence_parallel = gather_after, sequence_parallel
        self.program = Program(ranks)
        self.sizes: dict[int, tuple[str, int, str, frozenset[str]]] = {}
        self.output_values: list[Any] = []
        self.pending: dict[int, tuple[int, torch.dtype]] = {}  # pending sums: bytes and type

    # ------------------------------------------------------------------ begin and end
    def begin(self) -> None:
        program = self.program
        for node in self.traced.inputs:
            number = program.new_id()
            program.inputs.append(number)
            if node is not None:
                shapes, dtype = self._describe(node.meta["val"])
                self.env[node] = Value(Ref(number), REPLICATED, shapes, dtype, differentiable(dtype))
        for name, (node, _) in self.traced.constants.items():
            shapes, dtype = self._describe(node.meta["val"])
            program.constants[name] = program.new_id()
            self.env[node] = Value(Ref(program.constants[name]), REPLICATED, shapes, dtype, False)
        for name, (node, is_parameter) in self.traced.states.items():
            self.env[node] = self._state(name, node, is_parameter)

    def _state(self, name: str, node: Any, is_parameter: bool) -> Value:
        canonical = self.tensors.canonical(name)
        if canonical not in self.program.states:
            self.program.states[canonical] = self.program.new_id()
        shapes, dtype = self._describe(node.meta["val"])
        value = Value(
            Ref(self.program.states[canonical]),
            REPLICATED,
            shapes,
            dtype,
            is_parameter and differentiable(dtype),
            weight=canonical,
        )
        division = self.divisions.get(canonical)
        if division is not None:
            dim, owner = division
            owners = np.asarray(owner, dtype=np.int64)
            value.place = Sharded(dim, (owners,) * self.assignments, frozenset({canonical}))
            if value.grad and is_mixed((owners,)):
                local = tuple(
                    tuple(np.flatnonzero(owners[positions(owners, r)] == ALL).tolist()) for r in range(self.ranks)
                )
                value.ref = self.emit(runtime.Shared(dim, local), value)
            value.stored = canonical in self.stored_names
        return value

    def finish(self) -> list[Any]:
        self.node = None
        outputs: list[Any] = []
        for item in self.traced.outputs:
            value = self.env[item] if isinstance(item, torch.fx.Node) else item
            if isinstance(value, Value):
                keep = (
                    not self.gather_outputs
                    and isinstance(value.place, Sharded)
                    and not value.stored
                    and value.whole is None
                    and not is_mixed(value.place.owners)
                )
                if not keep:
                    value = self.full(value, "it is an output of the model")
                outputs.append(value.ref)
            else:
                outputs.append(value.ref if isinstance(value, Sym) else value)
            self.output_values.append(value)
        self.program.outputs = outputs
        for name, node in self.traced.updates.items():
            value = self.env[node]
            division = self.divisions.get(self.tensors.canonical(name))
            held = Sharded(division[0], (np.asarray(division[1]),) * self.assignments) if division else None
            if held is None:
                ref = self.full(value, "a buffer is updated").ref
            elif (
                isinstance(value.place, Sharded)
                and value.place.dim == held.dim
                and same(value.place.owners, held.owners)
            ):
                ref = value.ref
            else:
                ref = self.part(self.full(value, "a buffer is updated"), held.dim, held.owners)
            assert ref is not None
            self.program.updates[name] = ref
        prune(self.program)
        if self.sequence_parallel:
            divide_along_sequence(self.program, self.env, self.sizes)
        else:
            self._merge()
        return outputs

    def _merge(self) -> None:
        """Do all-reduces together that need not wait for one another."""
        payloads = {
            step.out: Payload(nbytes, self.pending[step.args[0].id][1], where, origin)
            for step in self.program.steps
            if step.out in self.sizes
            for kind, nbytes, where, origin in (self.sizes[step.out],)
            if kind == "all_reduce"
        }
        if len(payloads) > 1:
            merged = merge_all_reduces(self.program, self.pending, payloads)
            for number in payloads:
                self.sizes.pop(number, None)
            for number, p in merged.items():
                self.sizes[number] = ("all_reduce", p.nbytes, p.where, p.origin)

    def communications(self) -> list[Communication]:
        """The collectives that remain in the program, in order."""
        return [
            Communication(*self.sizes[step.out][:2], step.out, *self.sizes[step.out][2:])
            for step in self.program.steps
            if step.out in self.sizes
        ]

    # ------------------------------------------------------------------ checks
    def unify(self, a: Owners, b: Owners) -> Owners:
        if not same(a, b):
            raise Unproven("operands are divided differently")
        return a

    def regroup(self, labels: Sequence[Any], offset: int) -> tuple[int, Owners]:
        dims, owners = set(), []
        for array in labels:
            varying = [
                d for d in range(array.ndim) if array.shape[d] > 1 and not (array == array.take([0], axis=d)).all()
            ]
            if len(varying) != 1:
                raise Unproven(f"the division would run along {len(varying)} dimensions of the result")
            dims.add(varying[0])
            owners.append(array[tuple(slice(None) if d == varying[0] else 0 for d in range(array.ndim))].copy())
        if len(dims) != 1:
            raise Unproven("divided along different dimensions at different sizes")
        shared = owners[0]
        return dims.pop(), tuple(shared if np.array_equal(o, shared) else o for o in owners)

    def regroup_rows(self, labels: Sequence[Any]) -> tuple[int, Owners]:
        if any(not (array == array[:, :1]).all() for array in labels):
            raise Unproven("a group of indices straddles ranks")
        owners = tuple(array[:, 0] for array in labels)
        if any(not self.every_rank(o) for o in owners):
            raise Unproven("some rank would hold nothing")
        return 0, owners

    def every_rank(self, owner: Any) -> bool:
        if (owner == ALL).any():
            return True
        return bool((np.bincount(owner, minlength=self.ranks)[: self.ranks] > 0).all())

    def gathers_after(self, weights: Sequence[str | None]) -> bool:
        return any(w in self.gather_after for w in weights)

    # ------------------------------------------------------------------ writing the program
    def emit(self, fn: Any, *args: Any, **kwargs: Any) -> Ref | None:
        out = self.program.new_id()
        if fn in _VIEWS:  # what was a view of the traced operand may not be one of a part, or of a gathered whole
            fn = torch.ops.aten.reshape.default
        local_args = tuple(_reference(arg) for arg in args)
        local_kwargs = {name: _reference(arg) for name, arg in kwargs.items()}
        self.program.steps.append(
            Step(fn, local_args, local_kwargs, out, self.node.name if self.node is not None else OUTPUT)
        )
        return Ref(out)

    def result(self, call: Call, ref: Ref | None, place: Place, index: int | None = None) -> Value:
        value = super().result(call, ref, place, index)
        if isinstance(place, Partial) and ref is not None:
            self.pending[ref.id] = (value.nbytes, value.dtype)
        return value

    def full(self, value: Value, why: str) -> Value:
        if value.whole is not None:
            return value.whole
        place = value.place
        if isinstance(place, Partial):
            value.whole = self._reduce(value)
        elif isinstance(place, Sharded):
            value.whole = self._gather(value, place, why)
        else:
            return value
        return value.whole

    def _reduce(self, value: Value) -> Value:
        if value.redo is not None:
            source, call, index = value.redo
            whole = self.full(source, "")
            refs: dict[int, Ref | None] = {id(source): whole.ref}
            bound = {name: map_values(lambda v: refs.get(id(v), v), item) for name, item in call.bound.items()}
            args, kwargs = call.spread(bound)
            ref = self.emit(call.op, *args, **kwargs)
            if index is not None:
                ref = self.item(ref, index)
            return Value(ref, REPLICATED, value.shapes, value.dtype, value.grad)
        ref = self.emit(runtime.AllReduce(), value)
        assert isinstance(value.place, Partial)
        assert value.ref is not None
        self.pending[value.ref.id] = (value.nbytes, value.dtype)
        self._note("all_reduce", ref, value, value.place.origin)
        return Value(ref, REPLICATED, value.shapes, value.dtype, value.grad)

    def _gather(self, value: Value, place: Sharded, why: str) -> Value:
        described = pattern(place.owners)
        assert described is not None, "a placement that cannot be gathered was let through"
        if is_mixed(place.owners):
            ref = self._gather_mixed(value, place, described)
        else:
            ref = self.emit(runtime.AllGather(place.dim, *_layout(described, self.ranks)), value)
            self._note("all_gather", ref, value, place.origin)
        if why:
            name = self.node.name if self.node is not None else OUTPUT
            op = str(self.node.target) if self.node is not None else OUTPUT
            self.reasons.append(Gathered(name, op, why, place.origin, value.nbytes))
        return Value(ref, REPLICATED, value.shapes, value.dtype, value.grad)

    def _gather_mixed(self, value: Value, place: Sharded, described: Pattern) -> Ref | None:
        """Gather what is divided, and put what every rank holds in its place."""
        if described.outer != 1 or described.inner != 1:
            raise PlanError("a division of free size that is shared in part cannot be gathered")
        owner, dim = described.base, place.dim
        of = [owner[positions(owner, r)] for r in range(self.ranks)]
        mine = PerRank(tuple(tuple(np.flatnonzero(o != ALL).tolist()) for o in of))
        shared = PerRank(tuple(tuple(np.flatnonzero(o == ALL).tolist()) for o in of))
        own = Pattern(owner[owner != ALL])
        part = self.emit(runtime.take_indices, value, dim, mine)
        own_ref = self.emit(runtime.AllGather(dim, *_layout(own, self.ranks)), part)
        self._note("all_gather", own_ref, value, place.origin)
        shared_ref = self.emit(runtime.take_indices, value, dim, shared)
        joined = self.emit(torch.cat, [own_ref, self.leave(shared_ref) if value.grad else shared_ref], dim)
        order = np.argsort(np.concatenate([np.flatnonzero(owner != ALL), np.flatnonzero(owner == ALL)]))
        return self.emit(runtime.take_indices, joined, dim, tuple(order.tolist()))

    def leave(self, ref: Ref | None) -> Ref | None:
        return self.emit(runtime.Leave(), ref)

    def _note(self, kind: str, ref: Ref | None, value: Value, origin: frozenset[str]) -> None:
        assert ref is not None
        where = self.node.name if self.node is not None else OUTPUT
        self.sizes[ref.id] = (kind, value.nbytes, where, origin)

    def enter(self, value: Value) -> Ref | None:
        if value.whole is not None:
            value = value.whole
        if not value.grad:
            return value.ref
        if value.entered is None:
            value.entered = self.emit(runtime.Enter(), value)
        return value.entered

    def part(self, value: Value, dim: int, owners: Owners) -> Ref | None:
        place = value.place
        if isinstance(place, Sharded):
            if place.dim == dim and same(place.owners, owners):
                return value.ref
            value = self.full(value, "divided otherwise than needed")
        elif isinstance(place, Partial):
            value = self.full(value, "")
        if value.whole is not None:
            value = value.whole
        for known_dim, known_owners, ref in value.parts:
            if known_dim == dim and same(known_owners, owners):
                return ref
        if any(dim >= len(shape) or len(o) != shape[dim] for o, shape in zip(owners, value.shapes, strict=True)):
            raise Unproven("sizes differ")
        ref = self._take(value, dim, owners)
        value.parts.append((dim, owners, ref))
        return ref

    def _take(self, value: Value, dim: int, owners: Owners) -> Ref | None:
        described = pattern(owners)
        if described is None:
            raise Unproven("a division that no pattern describes")
        whole = self.enter(value)
        index = [positions(described.base, r) for r in range(self.ranks)]
        if described.outer == 1 and described.inner == 1:
            if all(len(i) == 0 or i[-1] - i[0] + 1 == len(i) for i in index):
                starts = PerRank(tuple(int(i[0]) if len(i) else 0 for i in index))
                return self.emit(runtime.take_range, whole, dim, starts, PerRank(tuple(len(i) for i in index)))
            return self.emit(runtime.take_indices, whole, dim, PerRank(tuple(tuple(i.tolist()) for i in index)))
        indices = PerRank(tuple(tuple(i.tolist()) for i in index))
        return self.emit(
            runtime.take_pattern, whole, dim, indices, len(described.base), described.outer, described.inner
        )


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def _reference(argument: Any) -> Any:
    if isinstance(argument, (Value, Sym)):
        return argument.ref
    if isinstance(argument, list):
        return [_reference(item) for item in argument]
    if type(argument) is tuple:
        return tuple(_reference(item) for item in argument)
    return argument


def _layout(described: Pattern, ranks: int) -> tuple[Any, ...]:
    """Arguments of :class:`runtime.AllGather` for a pattern."""
    base = described.base
    order = None
    if not is_contiguous(base):
        by_rank = np.concatenate([positions(base, r) for r in range(ranks)])
        order = tuple(int(i) for i in np.argsort(by_rank))
    return counts(base, ranks), order, described.outer, described.inner


__all__ = ["PARTIAL", "Communication", "Prover", "map_refs"]
