"""Tracing a model into one functional graph of ATen operations, without its weights.

``torch.export`` with free batch and sequence dimensions, then ``run_decompositions({})``, which functionalises and
keeps composite
operations such as ``linear`` whole. Parameters are traced as reserved address space (``reserve``), so a model of any
size costs
megabytes. Mutation that remains after functionalisation is refused: a gathered copy would silently break its aliasing.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import branches, hits
from tensor_parallel.planner.branches import Branches
from tensor_parallel.planner.functional import functionalise
from tensor_parallel.planner.reserve import tracing_settings

log = logging.getLogger(__name__)

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

    def admits(self, leaves: Sequence[Any]) -> bool:
        """Whether inputs of these sizes meet everything the trace assumed of its free sizes."""
        sizes: dict[sympy.Symbol, int] = {}
        for node, leaf in zip(self.inputs, leaves, strict=True):
            if node is None:
                continue
            for size, actual in zip(node.meta["val"].shape, leaf.shape, strict=True):
                expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
                if expr.is_Symbol:
                    if sizes.setdefault(expr, actual) != actual:
                        return False
                elif not expr.is_number and expr.subs(sizes) != actual:
                    return False
        return _satisfies(self.guards, sizes)

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


def trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, flipped: Collection[int] = ()) -> Traced:
    """Trace ``model`` called as ``model(*args, **kwargs)``, with as many dimensions left free as it allows.

    ``flipped``: branches on inputs' values, by number, that are taken the other way than these inputs decide. Raises
    :class:`PlanError` when the model cannot be expressed as one functional graph.
    """
    failures: list[str] = []
    for example_args, example_kwargs, free in _attempts(args, kwargs):
        try:
            exported = _export(model, example_args, example_kwargs, free)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
            log.debug("tracing failed (free dims: %s): %s", free, failures[-1])
            if _hopeless(error):
                resolved = _with_branches(model, example_args, example_kwargs, free, flipped)
                if resolved is not None:
                    return _collect(resolved[0], example_args, example_kwargs, resolved[1])
                break
            continue
        if free == "images fixed" and not _cuts_windows(exported):
            continue
        return _collect(exported, example_args, example_kwargs)
    raise PlanError(f"{type(model).__name__} does not export: {failures[0] if failures else 'no attempt was possible'}")


_Resolved = tuple[torch.export.ExportedProgram, branches.Decided]


def _with_branches(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: str, flipped: Collection[int]
) -> _Resolved | None:
    """A trace in which loops over set indices visit every index, and branches on inputs go the example's way, if that
    is what it takes. Inputs that decide otherwise must be traceable too."""
    loops: hits.Unrolled | None = hits.Unrolled()
    while loops is not None:
        try:
            if flipped:
                return _resolve(model, args, kwargs, free, loops, flipped)
            first = _resolve(model, args, kwargs, free, loops, {0})
            if not first[1].decisions:
                return first
            taken = _resolve(model, args, kwargs, free, hits.Unrolled(loops.refused), ())
            if len(taken[1].decisions) > branches.MOST:
                raise PlanError(f"more than {branches.MOST} branches on values")
            known: dict[branches.Way, _Resolved] = {(): taken, (0,): first}
            refused = loops.refused

            def branches_on(way: branches.Way, known: Any = known, refused: Any = refused) -> int:
                found = known.get(way) or _resolve(model, args, kwargs, free, hits.Unrolled(refused), way)
                return len(found[1].decisions)

            branches.try_ways(branches_on, max(2**branches.AHEAD - 1, len(taken[1].decisions)))
            return taken
        except Exception as error:
            log.debug("tracing with control flow resolved failed: %s: %s", type(error).__name__, error)
            loops = loops.without(error)
    return None


def _resolve(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: str,
    loops: hits.Unrolled,
    flipped: Collection[int],
) -> _Resolved:
    decided = branches.Decided(flipped)
    with decided.around(model, args, kwargs):
        return _export(model, args, kwargs, free, loops), decided


def _attempts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any], str]]:
    """Example inputs and which dimensions to leave free, best first."""
    tries: list[tuple[tuple[Any, ...], dict[str, Any], str]] = []
    widened = _widen(tuple(args), dict(kwargs))
    if any(_is_image(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
        tries.append((*(widened or (tuple(args), dict(kwargs))), "images fixed"))
    if widened is not None:
        tries.append((*widened, "all"))
    tries.append((tuple(args), dict(kwargs), "all"))
    tries.append((tuple(args), dict(kwargs), "batch"))
    tries.append((tuple(args), dict(kwargs), "none"))
    return tries


def _widen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A batch of one would be traced as the constant 1: trace with two."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or any(t.ndim == 0 or t.shape[0] != 1 for t in tensors):
        return None
    twice = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), (args, kwargs))
    return twice[0], twice[1]


def _is_image(leaf: Any) -> bool:
    """Images and video: a batch of channels, heights and widths."""
    return isinstance(leaf, Tensor) and leaf.ndim >= 4 and leaf.dtype.is_floating_point


_RESHAPES = re.compile("view|reshape|unflatten")


def _cuts_windows(exported: torch.export.ExportedProgram) -> bool:
    """Whether maps are reshaped to maps, as by window attention.

    With heights and widths free, every size would then be a quotient of quotients, which takes minutes to reason about;
    such a model is traced for images of one size (and traced again where another size is asked for).
    """

    def ndim(node: Any) -> int:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return value.ndim if isinstance(value, Tensor) else 0

    reshapes = [node for node in exported.graph.nodes if node.args and _RESHAPES.search(str(node.target))]
    return any(ndim(node) > 4 or (ndim(node) == 4 and ndim(node.args[0]) >= 4) for node in reshapes)


def _hopeless(error: Exception) -> bool:
    """Failures that fixing sizes cannot cure: control flow that depends on values."""
    return type(error).__name__ in ("GuardOnDataDependentSymNode", "DynamicOutputShapeException")


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: str, unrolled: hits.Unrolled | None = None
) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        first = min(leaf.ndim, 1)
        count = {"all": leaf.ndim, "images fixed": first if _is_image(leaf) else leaf.ndim, "batch": first}[free]
        return dict.fromkeys(range(count), auto) or None

    shapes = None
    if free != "none":
        named = dict(zip(_positional_names(model, len(args)), args, strict=False)) | kwargs
        shapes = _nested(model, {name: pytree.tree_map(dims, value) for name, value in named.items()})
    loggers = [
        logging.getLogger(name) for name in ("torch.fx", "torch._export", "torch.fx.experimental.symbolic_shapes")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # a failed attempt is an answer here, not an error to print
    try:
        # Under no_grad the trace has no nested regions for no_grad blocks; gradients never depend on it.
        with torch.no_grad(), tracing_settings():
            with unrolled.around(model) if unrolled is not None else nullcontext():
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            if unrolled is not None:
                unrolled.finish()
                if unrolled.bodies:
                    hits.prove(exported.graph)
            if not _is_functional(exported, model.training):
                exported = exported.run_decompositions({})
            if unrolled is not None and unrolled.bodies:
                hits.drop_checks(exported.graph)
            return exported
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_functional(exported: torch.export.ExportedProgram, training: bool) -> bool:
    """Whether the trace mutates nothing, or could be made so without tracing it again, which costs twice as much.

    Training is always functionalised: ``batch_norm`` updates its statistics without saying so in its schema.
    """
    _without_idle_dropout(exported.graph)
    if training:
        return False
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.detach_.default:  # of a constant just made
            node.target = torch.ops.aten.detach.default
    return functionalise(exported.graph)


_DROPOUTS = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
)


def _without_idle_dropout(graph: fx.Graph) -> None:
    """Dropout that drops nothing returns its very input, which its schema does not say: a later write would be lost."""
    for node in list(graph.nodes):
        if node.target not in _DROPOUTS or any(user.op == "output" for user in node.users):
            continue
        source, probability, train = node.args
        if not train or probability == 0:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _nested(model: nn.Module, shapes: dict[str, Any]) -> dict[str, Any]:
    """Arguments that the model takes as ``**kwargs`` lie under that name."""
    parameters = inspect.signature(model.forward).parameters
    rest = next((name for name, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    extra = {name: shape for name, shape in shapes.items() if name not in parameters}
    if rest is None or not extra:
        return shapes
    return {name: shape for name, shape in shapes.items() if name in parameters} | {rest: extra}


def _positional_names(model: nn.Module, count: int) -> list[str]:
    return list(itertools.islice(inspect.signature(model.forward).parameters, count))


def _collect(
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    decided: branches.Decided | None = None,
) -> Traced:
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
        taken = branches.Branches(conditions, decided.decisions, inputs, values) if conditions else None
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


def _satisfies(guards: Sequence[Any], sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Guards over other symbols than the inputs' sizes are not ours to check."""
    return not any(guard.free_symbols <= sizes.keys() and guard.subs(sizes) == sympy.false for guard in guards)


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
        if other != hints and _satisfies(guards, other):
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
