"""Propagation of placements through a traced graph: the walk shared by solving and proving.

*Solving* carries atoms and joins them, to find out which indices of which weights should live together. *Proving*
carries ranks
and checks every step, and writes the program. Both run the same rules (``rules/``), so what is proven is what was
solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import runtime
from tensor_parallel.planner.placement import (
    ALL,
    PARTIAL,
    REPLICATED,
    Owners,
    Partial,
    Place,
    Replicated,
    Sharded,
    Undecided,
    Unproven,
    is_mixed,
)
from tensor_parallel.planner.program import PerRank, Ref
from tensor_parallel.planner.stopping import pause
from tensor_parallel.planner.tensors import differentiable
from tensor_parallel.planner.traced import Traced
from tensor_parallel.planner.values import Call, Sym, Value, map_values

aten = torch.ops.aten


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, (Value, Sym))


@dataclass
class Gathered:
    """Why a divided value had to be made whole."""

    where: str
    op: str
    why: str
    origin: frozenset[str]
    nbytes: int


Rule = Callable[["Engine", Call], Any]


class Engine:
    """The walk. ``Solver`` and ``Prover`` say what joining, slicing and communicating mean."""

    solving = False

    def __init__(
        self, traced: Traced, ranks: int, assignments: int, rules: dict[str, Rule], partial_rules: dict[str, Rule]
    ) -> None:
        self.traced, self.ranks, self.assignments = traced, ranks, assignments
        self.rules, self.partial_rules = rules, partial_rules
        self.env: dict[fx.Node, Any] = {}
        self.node: fx.Node | None = None
        self.reasons: list[Gathered] = []

    # ------------------------------------------------------------------ what the two modes define
    def unify(self, a: Owners, b: Owners) -> Owners:
        """Owners that both operands can agree on; raises Unproven when there are none."""
        raise NotImplementedError

    def regroup(self, labels: Sequence[Any], offset: int) -> tuple[int, Owners]:
        """The one dimension along which owner arrays (one per assignment) vary, and the owners along it.

        ``offset`` is the position of their first dimension within the whole result. Raises Unproven when they
        vary along several.
        """
        raise NotImplementedError

    def regroup_rows(self, labels: Sequence[Any]) -> tuple[int, Owners]:
        """Like ``regroup`` for two-dimensional owner arrays, along rows: each row must have one owner."""
        raise NotImplementedError

    def every_rank(self, owner: Any) -> bool:
        """Whether every rank holds some of these indices."""
        raise NotImplementedError

    def share(self, owners: Owners) -> bool:
        """Let every rank hold these indices, a small piece of larger weights; False where that is not to be had."""
        return False

    def leave(self, ref: Ref | None) -> Ref | None:
        """A reference to a piece that is shared as a whole, for use as a replicated value."""
        return ref

    def exclusive(self, owners: Owners) -> None:
        """Raise Unproven when some indices are shared: a sum over ranks would count them several times."""
        if not self.solving and is_mixed(owners):
            raise Unproven("some of what is summed lies on every rank")

    def cut(self, owners: Owners) -> None:
        """These indices are used apart from the rest: they should be balanced by themselves."""

    def emit(self, fn: Any, *args: Any, **kwargs: Any) -> Ref | None:
        """Add a step to the program."""
        raise NotImplementedError

    def place(self, value: Value) -> Place:
        return value.place

    def commit(self, value: Value, dim: int | None = None, owners: Owners | None = None) -> None:
        """Settle an undecided parameter: divided along this view's ``dim`` by ``owners``, or the default for None."""

    def commit_whole(self, value: Value) -> None:
        """Settle an undecided parameter as replicated."""

    def divide(self, value: Value, dim: int) -> Owners:
        """Settle an undecided parameter by dividing this view's ``dim``, each index on its own; raises
        Unproven if it may not be."""
        raise Unproven("everything is settled")

    def settle_for_pieces(self, value: Value, dim: int) -> bool:
        """Settle an undecided parameter that is about to be cut into pieces along ``dim``; False to leave it
        undecided."""
        return False

    def settle_for_reshape(self, value: Value) -> None:
        """Settle an undecided parameter that is about to be reshaped."""

    def settle_addend(self, value: Value) -> None:
        """Settle an undecided parameter that is added to a pending sum, to which each rank may add its own part."""

    def prefer(self, value: Value) -> str:
        """How the search wants this weight divided: "auto" (by output) or "in" (by input)."""
        return "auto"

    def gathers_after(self, weights: Sequence[str | None]) -> bool:
        """Whether the search wants the result of these weights whole at once."""
        return False

    def worth_dividing(self, value: Value) -> bool:
        """Whether a parameter is large enough for its division to matter."""
        return False

    # ------------------------------------------------------------------ helpers for rules
    def is_sharded(self, value: Any, dim: int | None = None) -> bool:
        place = self.place(value) if isinstance(value, Value) else None
        return isinstance(place, Sharded) and (dim is None or place.dim == dim)

    def sharded(self, value: Value) -> Sharded:
        place = self.place(value)
        assert isinstance(place, Sharded)
        return place

    def undecided(self, value: Any) -> bool:
        return isinstance(value, Value) and isinstance(self.place(value), Undecided)

    def result(self, call: Call, ref: Ref | None, place: Place, index: int | None = None) -> Value:
        shapes = call.shapes if index is None else call.shapes[index]
        dtype = call.dtypes if index is None else call.dtypes[index]
        if isinstance(place, Sharded) and any(
            place.dim >= len(shape) or len(owner) != shape[place.dim]
            for shape, owner in zip(shapes, place.owners, strict=True)
        ):
            raise Unproven("the result's sizes are not those the rule expects")
        grad = differentiable(dtype) and any(v.grad for v in call.values())
        if isinstance(place, Sharded) and not self.solving and all(o.size and (o == ALL).all() for o in place.owners):
            return Value(self.leave(ref) if grad else ref, REPLICATED, shapes, dtype, grad)
        return Value(ref, place, shapes, dtype, grad)

    def replay(self, call: Call, /, **replacements: Any) -> Ref | None:
        """The call itself with some arguments replaced."""
        args, kwargs = call.spread(replacements)
        return self.emit(call.op, *args, **kwargs)

    def replay_with(self, call: Call, refs: dict[int, Ref | None], /, **replacements: Any) -> Ref | None:
        """The call on local operands: ``refs`` by operand, every other operand whole and entering the divided
        region."""

        def local(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            return refs[id(leaf)] if id(leaf) in refs else self.enter(leaf)

        bound = {name: map_values(local, item) for name, item in call.bound.items()}
        args, kwargs = call.spread({**bound, **replacements})
        return self.emit(call.op, *args, **kwargs)

    def replay_entered(self, call: Call, local: Value) -> Ref | None:
        """The call with ``local`` as it is and every other operand whole."""
        return self.replay_with(call, {id(local): local.ref})

    def replay_random(self, call: Call, /, **replacements: Any) -> Ref | None:
        """The call with random numbers of the rank's own."""
        args, kwargs = call.spread(replacements)
        rank = PerRank(tuple(range(self.ranks)))
        return self.emit(runtime.with_rank_seed, call.op, rank, *args, **kwargs)

    def visit_again(self, call: Call) -> Any:
        """Start over, now that a parameter has been settled."""
        if all(isinstance(self.place(v), Replicated) for v in call.values()):
            return self.plain(call)
        return self.apply(call)

    def whole_now(self, value: Value) -> Value:
        """``value``, which must already be whole or have a whole copy; gathers otherwise."""
        return value if isinstance(self.place(value), Replicated) else self.full(value, "needed whole")

    def alike(self, values: Sequence[Value], lead: Value, dim: int) -> tuple[list[Ref | None], Owners, frozenset[str]]:
        """Local parts of operands of equal rank, all divided as ``lead`` is along ``dim``."""
        place = self.sharded(lead)
        owners, origin = place.owners, place.origin
        refs: list[Ref | None] = []
        for value in values:
            own = self.place(value)
            if isinstance(own, Sharded) and own.dim == dim:
                try:
                    owners = self.unify(owners, own.owners)
                    origin |= own.origin
                    refs.append(value.ref)
                    continue
                except Unproven:
                    pass
            if isinstance(own, Sharded):
                value = self.full(value, "operands divided differently")
            refs.append(self.part(value, dim, owners))
        return refs, owners, origin

    def full(self, value: Value, why: str) -> Value:
        """``value`` whole on every rank, communicating once if it is not."""
        raise NotImplementedError

    def enter(self, value: Value) -> Ref | None:
        """A replicated value's reference for use inside a divided computation."""
        raise NotImplementedError

    def part(self, value: Value, dim: int, owners: Owners) -> Ref | None:
        """A reference to the local part of ``value`` along ``dim``: itself, a slice of the whole, or Unproven."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the walk
    def run(self) -> list[Any]:
        self.begin()
        for node in self.traced.graph.nodes:
            pause()
            if node.op in ("call_function", "get_attr"):
                self.node = node
                self.env[node] = self.visit(node, self.env)
        return self.finish()

    def begin(self) -> None:
        raise NotImplementedError

    def finish(self) -> list[Any]:
        raise NotImplementedError

    def visit(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return getattr(self.traced.module, str(node.target))
        args = fx.node.map_arg(node.args, lambda n: env[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
        target = node.target
        if target in _GETITEM and isinstance(args[0], (list, tuple)):
            position: Any = args[1]
            return args[0][position]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self.visit_region(node, args)
        if not isinstance(target, torch._ops.OpOverload):
            return self.symbolic(node, args, kwargs)
        if "assert" in target._schema.name or target in _CONSTRAINTS:
            return None
        return self.visit_op(node, args, kwargs)

    def visit_region(self, node: fx.Node, args: Any) -> Any:
        """A region that only sets a mode (gradients, autocast off) is walked in place; any other nested graph
        is refused."""
        name = str(node.target)
        if name == "wrap_with_set_grad_enabled":
            module, operands = args[1], args[2:]
        elif name == "wrap_with_autocast" and args[2] is False:
            module, operands = args[4], args[5:]
        else:
            raise PlanError(f"the trace contains a nested graph ({name})")
        env: dict[fx.Node, Any] = {}
        inner = iter(operands)
        for child in module.graph.nodes:
            if child.op == "placeholder":
                env[child] = next(inner)
            elif child.op == "output":
                return list(fx.node.map_arg(child.args[0], lambda n: env[n]))
            elif child.op == "get_attr":
                env[child] = getattr(module, str(child.target))
            else:
                self.node = child
                env[child] = self.visit(child, env)
        raise AssertionError("a graph without an output")

    def symbolic(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Arithmetic on sizes and scalars."""
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_value)
        if any(isinstance(leaf, Value) for leaf in leaves):
            raise PlanError(f"{node.target} is not an ATen operation")
        values = self._sym_values(node, node.target, args, kwargs)
        return Sym(self.emit(node.target, *args, **kwargs), values)

    def _sym_values(self, node: fx.Node, fn: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        fake = node.meta.get("val")
        if isinstance(fake, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.traced.values(fake)[: self.assignments]
        return (fake,) * self.assignments

    def visit_op(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        fake = node.meta.get("val")
        if isinstance(fake, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            return self.scalar(node, args, kwargs)
        shapes, dtypes = self._describe(fake)
        call = Call(node, args, kwargs, shapes, dtypes)
        if call.name in _DROPOUT and call["train"] is False:
            return args[0]
        values = call.values()
        if any(v.stored for v in values):
            self._replace(call, lambda v: self.full(v, "") if v.stored else v)
            values = call.values()
        if all(isinstance(self.place(v), Replicated) for v in values):
            return self.plain(call)
        return self.apply(call)

    def _describe(self, fake: Any) -> tuple[Any, Any]:
        if isinstance(fake, Tensor):
            return self.traced.shapes(fake)[: self.assignments], fake.dtype
        if isinstance(fake, (list, tuple)):
            both = [self._describe(item) for item in fake]
            return [b[0] for b in both], [b[1] for b in both]
        return None, None

    def scalar(self, node: fx.Node, args: Any, kwargs: Any) -> Sym:
        """A size of a tensor, or a value read out of one."""
        values = self._sym_values(node, node.target, args, kwargs)
        source = args[0] if args else None
        if isinstance(source, Value):
            by_size = node.target is aten.sym_size.int
            place = self.place(source)
            local = isinstance(place, Sharded) and (not by_size or args[1] % source.ndim == place.dim)
            if isinstance(place, Undecided):
                self.commit(source)
            if local or (isinstance(place, Partial) and not by_size):
                args = (self.full(source, "its size or value is read"), *args[1:])
        return Sym(self.emit(node.target, *args, **kwargs), values)

    def apply(self, call: Call) -> Any:
        """By rule; when no rule proves it, whole operands and the operation as it stands."""
        pending = any(isinstance(self.place(v), Partial) and v.whole is None for v in call.values())
        if pending:
            rule = self.partial_rules.get(call.name)
            if rule is not None:
                try:
                    return rule(self, call)
                except Unproven:
                    pass
        self._settle(call)
        values = call.values()
        if all(isinstance(self.place(v), Replicated) for v in values):
            return self.plain(call)
        rule = self.rules.get(call.name)
        try:
            if rule is None:
                raise Unproven("no rule for it")
            return rule(self, call)
        except Unproven as unproven:
            return self.gather_and_run(call, str(unproven))

    def _settle(self, call: Call) -> None:
        """Replace pending sums among the operands by their sums."""
        self._replace(call, lambda v: self.full(v, "") if isinstance(self.place(v), Partial) else v)

    def _replace(self, call: Call, f: Callable[[Value], Value]) -> None:
        call.bound = {name: map_values(f, bound) for name, bound in call.bound.items()}

    def gather_and_run(self, call: Call, why: str) -> Any:
        for value in call.values():
            if self.undecided(value):
                self.commit(value)
        self._replace(call, lambda v: self.full(v, why))
        return self.plain(call)

    def plain(self, call: Call) -> Any:
        """Every operand whole: the operation as traced, on every rank alike."""
        self._replace(call, lambda v: v if v.whole is None else v.whole)
        ref = self.replay(call)
        if isinstance(call.shapes, list):
            return [
                self.result(call, self.item(ref, i), REPLICATED, i) if shape is not None else None
                for i, shape in enumerate(call.shapes)
            ]
        if call.shapes is None:
            return None
        return self.result(call, ref, REPLICATED)

    def item(self, ref: Ref | None, index: int) -> Ref | None:
        import operator

        return self.emit(operator.getitem, ref, index)


def _getitems() -> tuple[Any, ...]:
    import operator

    return (operator.getitem,)


_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout")
_GETITEM = _getitems()
_CONSTRAINTS = tuple(
    getattr(aten, name).default
    for name in ("sym_constrain_range", "sym_constrain_range_for_size")
    if hasattr(aten, name)
)
__all__ = ["PARTIAL", "REPLICATED", "Call", "Engine", "Gathered", "Sym", "Value"]
