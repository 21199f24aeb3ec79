"""A functional graph, and what was assumed of the sizes and values of its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import branches
from tensor_parallel.planner.branches import Branches
from tensor_parallel.planner.signature import Signature, satisfies
from tensor_parallel.planner.tensors import differentiable

OWN = "derivatives of the model's own"
"""Where a traced graph's meta says which there are."""

Shapes = tuple[tuple[int, ...], ...]
"""A tensor's shape at each assignment of the free sizes."""


@dataclass
class Traced:
    """A functional graph and everything needed to call it."""

    graph: fx.Graph
    module: fx.GraphModule
    inputs: list[fx.Node | None]  # placeholder per flat user input; None when the leaf is a constant
    states: dict[str, tuple[fx.Node, bool]]  # name -> (placeholder, is a parameter)
    constants: dict[str, tuple[fx.Node, Tensor]]
    outputs: list[Any]  # flat user outputs: nodes or constants
    updates: dict[str, fx.Node]  # mutated buffers
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: list[Any]  # flat example inputs
    assignments: tuple[dict[sympy.Symbol, int], ...]
    guards: tuple[Any, ...] = ()  # what the trace assumed of the free sizes (a length divisible by a chunk size)
    branches: Branches | None = None  # what it assumed of the inputs' values
    own_derivatives: tuple[str, ...] = ()  # which the graph does not have; see ``derivatives``
    _cache: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def fixed(size: Any) -> int | None:
        """A size as a number, unless it is free (a size may have turned out to be fixed while tracing went on)."""
        if isinstance(size, torch.SymInt):
            expr = size.node.expr
            return int(expr) if expr.is_number else None
        return int(size)

    def shape(self, fake: Tensor) -> tuple[int, ...]:
        """A tensor's shape, -1 where free."""
        return tuple(-1 if (number := self.fixed(size)) is None else number for size in fake.shape)

    def signature(self) -> Signature:
        """How what is planned of this is to be called."""
        return Signature(
            in_spec=self.in_spec,
            out_spec=self.out_spec,
            example=self.example,
            sizes=[None if node is None else tuple(map(_size, node.meta["val"].shape)) for node in self.inputs],
            constants={name: tensor for name, (_, tensor) in self.constants.items()},
            assignments=self.assignments,
            guards=self.guards,
            branches=self.branches,
        )

    def release(self) -> None:
        """Let go of what torch remembers for more tracing. It never frees some storages whose sizes are free, and those
        keep all that there is: a megabyte for six layers, at every load."""
        for node in self.graph.nodes:
            fake = node.meta.get("val")
            for size in fake.shape if isinstance(fake, Tensor) else ():
                if isinstance(size, torch.SymInt):
                    getattr(size.node.shape_env, "fake_tensor_cache", {}).clear()
                    return

    def values(self, size: Any) -> tuple[int, ...]:
        """A symbolic size at each assignment."""
        if isinstance(size, (int, float, bool)):
            return (size,) * len(self.assignments)  # type: ignore[return-value]
        expr = size.node.expr
        known = self._cache.get(expr)
        if known is None:
            known = tuple(_evaluate(expr, assignment) for assignment in self.assignments)
            self._cache[expr] = known
        return known

    def shapes(self, fake: Tensor) -> Shapes:
        per_dim = [self.values(size) for size in fake.shape]
        return tuple(tuple(dim[k] for dim in per_dim) for k in range(len(self.assignments)))


def _size(size: Any) -> Any:
    """A number, or an expression where the size is free."""
    number = Traced.fixed(size)
    return size.node.expr if number is None else number


def collect(
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    decided: branches.Decided | None = None,
) -> Traced:
    """What ``torch.export`` made of a model called as ``model(*args, **kwargs)``.

    ``decided``: the branches that were taken. Raises :class:`PlanError` for what cannot be planned.
    """
    signature = exported.graph_signature
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    inputs: list[fx.Node | None] = []
    states: dict[str, tuple[fx.Node, bool]] = {}
    constants: dict[str, tuple[fx.Node, Tensor]] = {}
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        kind = spec.kind.name
        if kind == "USER_INPUT":
            inputs.append(node if "val" in node.meta and isinstance(node.meta["val"], Tensor) else None)
        elif kind in ("PARAMETER", "BUFFER"):
            states[str(spec.target)] = (node, kind == "PARAMETER")
        elif kind == "CONSTANT_TENSOR":
            constants[str(spec.target)] = (node, exported.constants[str(spec.target)])
        else:
            raise PlanError(f"the trace takes a {kind.lower().replace('_', ' ')}, which cannot be planned")
    _refuse_mutation(exported.graph_module)
    parameters = {node for node, is_parameter in states.values() if is_parameter}
    given = {node for node in inputs if node is not None and differentiable(node.meta["val"].dtype)}
    _without_idle_detach(exported.graph, parameters | given)
    _merge_repeats(exported.graph_module.graph)
    output_node = next(node for node in exported.graph.nodes if node.op == "output")
    outputs, updates = _outputs(output_node, signature)
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    guards = _guards(exported)
    assert in_spec is not None
    assert out_spec is not None
    taken = None
    if decided is not None:
        out_spec, count = out_spec.child(0), len(outputs) - len(decided.decisions)
        conditions, outputs = outputs[count:], outputs[:count]
        values = dict(constants.values())
        taken = Branches.of(conditions, decided.decisions, inputs, values) if conditions else None
        expected = [decision is not (i in decided.flipped) for i, decision in enumerate(decided.decisions)]
        if taken is not None and taken.decide(pytree.tree_leaves((args, kwargs)), expected) != expected:
            raise PlanError("the trace decides otherwise than the model")
    return Traced(
        graph=exported.graph,
        module=exported.graph_module,
        inputs=inputs,
        states=states,
        constants=constants,
        outputs=outputs,
        updates=updates,
        in_spec=in_spec,
        out_spec=out_spec,
        example=pytree.tree_leaves((args, kwargs)),
        assignments=_assignments(exported, guards),
        guards=guards,
        branches=taken,
        own_derivatives=exported.graph_module.meta.get(OWN, ()),
    )


def _outputs(
    output_node: fx.Node, signature: torch.export.ExportGraphSignature
) -> tuple[list[Any], dict[str, fx.Node]]:
    """The user's outputs, and the new values of buffers the model updates."""
    outputs: list[Any] = []
    updates: dict[str, fx.Node] = {}
    results: Any = output_node.args[0]
    for value, spec in zip(results, signature.output_specs, strict=True):
        kind = spec.kind.name
        if kind == "USER_OUTPUT":
            outputs.append(value)
        elif kind == "BUFFER_MUTATION":
            updates[str(spec.target)] = value
        else:
            raise PlanError(f"the model mutates {spec.target or 'an input'} ({kind.lower().replace('_', ' ')})")
    return outputs, updates


def _without_idle_detach(graph: fx.Graph, depends: set[fx.Node]) -> None:
    """Only what depends on parameters, or on inputs that may have gradients, has any to keep back."""
    for node in list(graph.nodes):
        if not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
        elif node.target is torch.ops.aten.detach.default and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _merge_repeats(graph: fx.Graph) -> None:
    """One node for one computation: ``x - mean`` written twice would else be summed over ranks twice."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags or "dropout" in str(node.target) or not node.users:
            continue
        try:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            first = seen.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _frozen(value: Any) -> Any:
    """A hashable copy that tells 1 from 1.0 and True."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return type(value), value


def _refuse_mutation(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        if schema is not None and schema.is_mutable and node.target is not torch.ops.aten.copy_.default:
            raise PlanError(f"{node.target} still mutates its argument after functionalisation")


def _guards(exported: torch.export.ExportedProgram) -> tuple[Any, ...]:
    """Relations between free sizes that tracing took for granted."""
    for node in exported.graph.nodes:
        fake = node.meta.get("val")
        for size in fake.shape if isinstance(fake, Tensor) else ():
            if isinstance(size, torch.SymInt):
                found = {guard.expr: None for guard in size.node.shape_env.guards}
                return tuple(expr for expr in found if getattr(expr, "free_symbols", None))
    return ()


def _assignments(exported: torch.export.ExportedProgram, guards: Sequence[Any]) -> tuple[dict[sympy.Symbol, int], ...]:
    """The example's sizes, and others: equal sizes stay equal, different ones grow by different primes.

    Multiples keep whatever divisibility the model asked for.
    """
    hints: dict[sympy.Symbol, int] = {}
    for node in exported.graph.nodes:
        fake = node.meta.get("val")
        for size in itertools.chain(fake.shape if isinstance(fake, Tensor) else (), (fake,)):
            if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                env = size.node.shape_env
                for symbol in size.node.expr.free_symbols:
                    if symbol not in hints:
                        hints[symbol] = _hint(env, symbol)
    if not hints:
        return ({},)
    ranges = exported.range_constraints
    primes = dict(zip(sorted(set(hints.values())), itertools.cycle((3, 2, 5, 7)), strict=False))
    growths: tuple[Callable[[int], int], ...] = (
        lambda h: h * primes[h],
        lambda h: 2 * h,
        lambda h: 3 * h,
        lambda h: h + 1,
    )
    for grown in growths:
        other = {}
        for symbol, hint in hints.items():
            upper = ranges[symbol].upper if symbol in ranges else sympy.oo
            other[symbol] = grown(hint) if grown(hint) <= upper else hint
        if other != hints and satisfies(guards, other):
            return hints, other
    return (hints,)


def _hint(env: Any, symbol: sympy.Symbol) -> int:
    for table in ("backed_var_to_val", "var_to_val"):
        known = getattr(env, table, {}).get(symbol)
        if known is not None:
            return int(known)
    return 4  # a size that depends on values (nonzero, item): any will do


def _evaluate(expr: Any, assignment: Mapping[sympy.Symbol, int]) -> int:
    value = expr.subs({symbol: assignment.get(symbol, 4) for symbol in expr.free_symbols})
    if getattr(value, "is_Boolean", False) or value in (sympy.true, sympy.false):
        return bool(value)
    return int(value) if value.is_integer else float(value)  # type: ignore[return-value]
