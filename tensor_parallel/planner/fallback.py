"""Models that do not export (control flow that depends on values): layers are sharded one by one, each followed by a gather.

Correct for any model, since every layer's input and output are whole; reported as ``mode == "modules"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from tensor_parallel import collectives
from tensor_parallel.errors import PlanError
from tensor_parallel.group import Group
from tensor_parallel.planner import runtime
from tensor_parallel.planner.plan import Collective, InputSpec, OutputSpec, Plan
from tensor_parallel.planner.shard import Shard
from tensor_parallel.planner.tensors import Tensors

_SMALL = 0.002  # of all bytes: tensors below stay whole


def plan_modules(
    twin: nn.Module,
    tensors: Tensors,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    world_size: int,
    *,
    reason: str,
    fixed: Mapping[str, Shard] | None = None,
) -> Plan:
    """Every large parameter divided along its longest dimension and gathered before the module that owns it runs."""
    shards = dict(fixed) if fixed is not None else {name: _shard(tensors, name, world_size) for name in tensors.stored}
    divided = [name for name, shard in shards.items() if shard.dim is not None]
    held = [
        sum(
            stored.nbytes if shards[name].dim is None else stored.nbytes // stored.shape[shards[name].dim or 0] * shards[name].local_size(rank)
            for name, stored in tensors.stored.items()
        )
        for rank in range(world_size)
    ]
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    names = list(kwargs) if len(kwargs) == len(leaves) else [f"input_{i}" for i in range(len(leaves))]
    return Plan(
        world_size=world_size,
        mode="modules",
        shards=shards,
        tied=dict(tensors.tied),
        inputs=tuple(InputSpec(n, t.dtype, (-1,) * t.ndim) for n, t in zip(names, leaves, strict=False)),
        outputs=(),
        collectives=tuple(Collective("all_gather", tensors.nbytes(name), name) for name in divided),
        reasons=(),
        bytes_per_rank=tuple(held),
        total_bytes=tensors.total_bytes,
        training=twin.training,
        notes=(f"not planned as a graph: {reason}",),
    )


def _shard(tensors: Tensors, name: str, ranks: int) -> Shard:
    stored = tensors.stored[name]
    if not stored.is_parameter or not stored.shape or tensors.nbytes(name) < _SMALL * tensors.total_bytes:
        return Shard.replicated()
    dim = max(range(len(stored.shape)), key=lambda d: (stored.shape[d], -d))
    return Shard.even(dim, stored.shape[dim], ranks) if stored.shape[dim] >= ranks else Shard.replicated()


def build_modules(
    plan: Plan, twin: nn.Module, *, rank: int, group: Group, read: Any, device: torch.device
) -> nn.Module:
    raise PlanError("; ".join(plan.notes))


__all__ = ["OutputSpec", "build_modules", "collectives", "functional", "math", "plan_modules", "runtime"]
