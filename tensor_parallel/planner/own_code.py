"""The trace against the model's own code: what tracing, and the rewriting that follows it, made of the model.

The plan is proven against the trace, so that a fault of the trace would be proven along with it. Here the model runs as
it is, on the same weights and inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tensor_parallel.planner.export import Traced
from tensor_parallel.planner.reserve import skeleton, tracing_settings
from tensor_parallel.planner.tensors import Tensors

log = logging.getLogger(__name__)

Distance = Callable[[Any, Tensor], float]


class NotComparable(Exception):
    """Why the model's own code says nothing about the trace."""


def outputs(
    twin: nn.Module, traced: Traced, tensors: Tensors, full: Mapping[str, Tensor], inputs: Sequence[Any]
) -> list[Any]:
    """The flat outputs of the model itself, with weights ``full``, on ``inputs``. Raises :class:`NotComparable`.

    A copy runs, and its buffers are copies: whatever the model keeps between calls is not kept.
    """
    if traced.branches is not None and not traced.branches.hold(inputs):
        raise NotComparable("the example takes other branches")
    copy = skeleton(twin)
    held = {name: full[tensors.canonical(name)] for name, _ in copy.named_parameters(remove_duplicate=False)}
    for name, _ in copy.named_buffers(remove_duplicate=False):
        held[name] = full[tensors.canonical(name)].clone()
    args, kwargs = pytree.tree_unflatten(list(inputs), traced.in_spec)
    try:
        with tracing_settings():
            result = torch.func.functional_call(copy, held, args, kwargs, tie_weights=False)
    except Exception as error:  # the model's own code raises anything
        raise NotComparable(f"it raised {type(error).__name__}: {error}") from error
    leaves, spec = pytree.tree_flatten(result)
    if spec != traced.out_spec or len(leaves) != len(traced.outputs):
        raise NotComparable("its result has another structure")
    return leaves


def differs(traced: Traced, own: Sequence[Any], trace: Mapping[fx.Node, Any], distance: Distance, limit: Any) -> str:
    """The first output that the trace computes otherwise; empty when there is none. ``limit(dtype)``: the tolerance."""
    for index, (node, value) in enumerate(zip(traced.outputs, own, strict=True)):
        if isinstance(node, fx.Node) and isinstance(value, Tensor):
            error = distance(trace[node], value)
            if not error <= limit(value.dtype):
                return f"output {index} with a relative error of {error:.1e}"
    return ""
