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
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import branches, hits
from tensor_parallel.planner.derivatives import Derivatives
from tensor_parallel.planner.functional import functionalise
from tensor_parallel.planner.reserve import replaced_forward, tracing_settings
from tensor_parallel.planner.stopping import pause, pausing
from tensor_parallel.planner.tensors import role
from tensor_parallel.planner.traced import OWN, Traced, collect

log = logging.getLogger(__name__)

TRACING = threading.Lock()
"""torch.export and torch.compile keep state of the whole process: two at once break each other."""


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
            pause()
            failures.append(_named(error))
            log.debug("tracing failed (free dims: %s): %s", free, failures[-1])
            if _hopeless(error):
                resolved = _with_branches(model, example_args, example_kwargs, free, flipped)
                if resolved is not None:
                    return collect(resolved[0], example_args, example_kwargs, resolved[1])
                break
            continue
        if free == "images fixed" and not _cuts_windows(exported):
            continue
        return collect(exported, example_args, example_kwargs)
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
            pause()
            log.debug("tracing with control flow resolved failed: %s", _named(error))
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


class _DependsOnValues(Exception):
    """The model's code depends on values: in place of the error by which torch says so, its cause."""


@contextmanager
def _without_a_dump(model: nn.Module) -> Iterator[None]:
    """Errors about values leave ``model`` under another name: by theirs, ``torch.export`` writes the source code of all
    that was traced so far to stderr."""
    forward = model.forward

    @wraps(forward)
    def renaming(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except RuntimeError as error:
            if "data-dependent" in str(error):
                raise _DependsOnValues from error
            raise

    with replaced_forward(model, renaming):
        yield


def _original(error: BaseException) -> BaseException:
    """The error itself, by whatever name it left the model."""
    return error.__cause__ if isinstance(error, _DependsOnValues) and error.__cause__ is not None else error


def _named(error: Exception) -> str:
    """An error's type and first line."""
    known = _original(error)
    return f"{type(known).__name__}: {str(known).strip().splitlines()[0] if str(known) else ''}"


def _hopeless(error: Exception) -> bool:
    """Failures that fixing sizes cannot cure: control flow that depends on values."""
    return type(_original(error)).__name__ in ("GuardOnDataDependentSymNode", "DynamicOutputShapeException")


_ALIKE = 5  # layers of a kind from which on remembering pays; for three it takes a sixth of the time of a trace


def _memory(model: nn.Module) -> AbstractContextManager[Any]:
    """Whether torch remembers what operations made of operands of the same kind: not where few layers are alike, since
    to write that down, and to check it, takes longer than to work it out again. There is no public way to say so."""
    from torch._dynamo import config  # which tracing imports; before that, it would only cost time

    names = [name for name, _ in model.named_parameters()]
    if len(names) >= _ALIKE * len({role(name) for name in names}) or not hasattr(config, "fake_tensor_cache_enabled"):
        return nullcontext()
    forgetting: AbstractContextManager[Any] = config.patch(fake_tensor_cache_enabled=False)
    return forgetting


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
        derivatives = Derivatives()
        # Under no_grad the trace has no nested regions for no_grad blocks: they become detached operands.
        settings = tracing_settings(derivatives.note)
        with torch.no_grad(), settings, pausing(model), _without_a_dump(model), _memory(model):
            with unrolled.around(model) if unrolled is not None else nullcontext(), derivatives.around(model):
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            if unrolled is not None:
                unrolled.finish()
                if unrolled.bodies:
                    hits.prove(exported.graph)
            if not _is_functional(exported, model.training):
                exported = exported.run_decompositions({})
            if unrolled is not None and unrolled.bodies:
                hits.drop_checks(exported.graph)
            exported.graph_module.meta[OWN] = tuple(sorted(derivatives.own))  # a model may go through a set
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
