"""The trace against the model's own code: what tracing, and the rewriting that follows it, made of the model.

The plan is proven against the trace, so that a fault of the trace would be proven along with it. Here the model runs as
it is, on the same weights and inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import hits
from tensor_parallel.planner.reserve import skeleton, tracing_settings
from tensor_parallel.planner.stopping import pause, pausing
from tensor_parallel.planner.tensors import Tensors
from tensor_parallel.planner.traced import Traced

log = logging.getLogger(__name__)

Distance = Callable[[Any, Tensor], float]
Visit = Callable[[int], bool]

_PLAIN = (bool, int, float, str, type(None))
_DROPOUTS = frozenset(
    ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
)
_DROPOUT_P = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}  # where its probability is given


class NotComparable(Exception):
    """Why the model's own code says nothing about the trace."""


def outputs(
    twin: nn.Module,
    traced: Traced,
    tensors: Tensors,
    full: Mapping[str, Tensor],
    inputs: Sequence[Any],
    visited: Visit | None = None,
) -> list[Any]:
    """The flat outputs of the model itself, with weights ``full``, on ``inputs``; nothing is dropped by dropout, and
    loops over set indices visit what ``visited`` says. Raises :class:`NotComparable`, and :class:`PlanError` if a
    second call gives something else for what the first has left in the model's attributes.

    A copy runs, and its buffers are copies: whatever the model keeps between calls is not kept.
    """
    if traced.branches is not None and not traced.branches.hold(inputs):
        raise NotComparable("the example takes other branches")
    args, kwargs = pytree.tree_unflatten(list(inputs), traced.in_spec)
    try:
        copy = skeleton(twin)

        def call() -> Any:
            held = {name: full[tensors.canonical(name)] for name, _ in copy.named_parameters(remove_duplicate=False)}
            for name, _ in copy.named_buffers(remove_duplicate=False):
                held[name] = full[tensors.canonical(name)].clone()
            given = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            return torch.func.functional_call(copy, held, *given, tie_weights=False)

        with pausing(copy), tracing_settings(), hits.Visited(visited) if visited else nullcontext(), NothingDropped():
            kept: list[Tensor] = []  # or another tensor could get the place, and so the identity, of one that is gone
            before, numbers = _attributes(copy, kept), torch.get_rng_state()
            result = call()
            changed = before ^ _attributes(copy, kept)
            if changed:
                torch.set_rng_state(numbers)
                again = call()
    except Exception as error:  # the model's own code raises anything
        pause()
        raise NotComparable(f"it raised {type(error).__name__}: {error}") from error
    leaves, spec = pytree.tree_flatten(result)
    if changed and not _alike(leaves, pytree.tree_leaves(again)):
        names = sorted({f"{name}.{attribute}".lstrip(".") for name, attribute, _ in changed})
        raise PlanError(f"what a call gives depends on calls before it, by {', '.join(names)}, which is no buffer")
    if spec != traced.out_spec or len(leaves) != len(traced.outputs):
        raise NotComparable("its result has another structure")
    return leaves


def _attributes(model: nn.Module, kept: list[Tensor]) -> set[tuple[str, str, Any]]:
    """What a module keeps beside parameters, buffers and modules: plain values, and tensors (also into ``kept``)."""
    found: set[tuple[str, str, Any]] = set()
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, (*_PLAIN, Tensor)) and attribute != "forward":
                if isinstance(value, Tensor):
                    kept.append(value)
                found.add((name, attribute, id(value) if isinstance(value, Tensor) else repr(value)))
    return found


def _alike(first: Sequence[Any], second: Sequence[Any]) -> bool:
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True):
                return False
        elif isinstance(a, _PLAIN) and repr(a) != repr(b):
            return False
    return True


def differs(traced: Traced, own: Sequence[Any], trace: Mapping[fx.Node, Any], distance: Distance, limit: Any) -> str:
    """The first output that the trace computes otherwise; empty when there is none. ``limit(dtype)``: the tolerance."""
    for index, (node, value) in enumerate(zip(traced.outputs, own, strict=True)):
        got = trace[node] if isinstance(node, fx.Node) else node
        if isinstance(value, Tensor):
            error = distance(got, value)
            if not error <= limit(value.dtype):
                return f"output {index} with a relative error of {error:.1e}"
        elif isinstance(value, _PLAIN) and got != value and not (got != got and value != value):
            return f"output {index} as {got}, not {value}"
    return ""


class NothingDropped(TorchFunctionMode):
    """Dropout returns its input."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        at = _DROPOUT_P.get(name)
        if at is not None and len(args) > at:
            args = (*args[:at], 0.0, *args[at + 1 :])
        elif at is not None and "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
