"""The library's front door: any module, sharded over the ranks of a group, used as the module itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensor_parallel.errors import PlanError
from tensor_parallel.group import Group, default_group
from tensor_parallel.planner.make import Examples, arguments, as_skeleton, instantiate_skeleton, plan_skeleton
from tensor_parallel.planner.plan import Plan
from tensor_parallel.planner.shard import Shard

log = logging.getLogger(__name__)


class DistributedModelWrapper(nn.Module):
    """``model`` sharded automatically: each rank holds its part of every large tensor and runs its part of the
    computation.

    Called like the model, it returns what the model returns, on every rank. Parameters, gradients and
    ``state_dict`` are this
    rank's parts under the model's own names.

    Args:
        model: the whole model, equal on every rank. It may be dropped afterwards: the wrapper copies what it keeps.
        world_size: ranks in the group.
        rank: this rank.
        example_inputs: keyword (or positional) arguments of one call. Without them the plan is made at the first call.
        sequence_parallel: divide what lies between sharded regions (norms, dropout, residual sums) along the sequence,
            by a reduce-scatter and an all-gather in place of each all-reduce: less memory while training. Raises
            :class:`PlanError` for a model that has no such operations.
        verify: check the plan against the unsharded computation before using it.
        group: the group to communicate in; the process's own when None.
    """

    def __init__(
        self,
        model: nn.Module,
        world_size: int,
        rank: int,
        example_inputs: Examples | None = None,
        *,
        sequence_parallel: bool = False,
        verify: bool = True,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: an nn.Module is needed, not {type(model).__name__}")
        self._group = group or (default_group() if world_size > 1 else Group(0, 1))
        if (self._group.rank, self._group.world_size) != (rank, world_size):
            raise PlanError(
                f"the group is rank {self._group.rank} of {self._group.world_size}, not {rank} of {world_size}"
            )
        self._verify, self._sequence_parallel = verify, sequence_parallel
        self._plan: Plan | None = None
        self._waiting: tuple[nn.Module, ...] = (model,)  # in a tuple: not a submodule
        self._inner: tuple[nn.Module, ...] = ()
        self.training = model.training
        if example_inputs is not None:
            self._shard(*arguments(example_inputs))

    # ------------------------------------------------------------------ planning
    @property
    def plan(self) -> Plan:
        """The plan of the first program. Raises :class:`PlanError` before the first call when no example was given."""
        if self._plan is None:
            raise PlanError("no plan yet: give example_inputs, or call the model once")
        return self._plan

    def _shard(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (model,) = self._waiting
        device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
        twin = as_skeleton(model)
        twin.train(self.training)
        plan = plan_skeleton(
            twin, args, kwargs, self._group.world_size, check=self._verify, sequence_parallel=self._sequence_parallel
        )
        hooked = [name for name, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
        if hooked:
            log.warning("gradient hooks of %s stay with the whole model: register them on the wrapper's", hooked)
        whole = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))

        def read(name: str, shard: Shard) -> Tensor:
            return shard.take(whole[name].detach(), self._group.rank)

        inner = instantiate_skeleton(plan, twin, rank=self._group.rank, group=self._group, read=read, device=device)
        self._plan, self._inner, self._waiting = plan, (inner,), ()
        # The parts are this module's own: same names, no prefix.
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        inner.train(self.training)

    # ------------------------------------------------------------------ use
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward."""
        if self._waiting:
            self._shard(args, {name: kwargs[name] for name in sorted(kwargs)})
        inner = self._inner[0]
        inner.training = self.training
        return inner(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Any:
        self._require_shards("parameters")
        return super().parameters(recurse)

    def _require_shards(self, what: str) -> None:
        if self._waiting:
            raise PlanError(f"no {what} yet: give example_inputs, or call the model once")

    # ------------------------------------------------------------------ checkpoints
    def full_state_dict(self) -> dict[str, Tensor]:
        """The ordinary checkpoint of the whole model, on rank 0's CPU; the others get ``{}``. Every rank must
        call it."""
        self._require_shards("state")
        result: dict[str, Tensor] = {}
        local = self.state_dict()
        for name in local:
            shard = self._shard_of(name)
            whole = self._assemble(local[name].detach(), shard)
            if self._group.rank == 0:
                result[name] = whole.cpu()
        return result

    def load_full_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Take this rank's parts from an ordinary checkpoint, given alike on every rank."""
        self._require_shards("state")
        self.load_state_dict(
            {n: self._shard_of(n).take(t, self._group.rank) if self._known(n) else t for n, t in state.items()}, strict
        )

    def _known(self, name: str) -> bool:
        return self.plan.tied.get(name, name) in self.plan.shards

    def _shard_of(self, name: str) -> Shard:
        return self.plan.shards[self.plan.tied.get(name, name)]

    def _assemble(self, local: Tensor, shard: Shard) -> Tensor:
        if shard.dim is None or self._group.world_size == 1:
            return local.clone()
        sizes = [shard.local_size(rank) for rank in range(self._group.world_size)]
        gathered = self._group.all_gather(local.contiguous(), sizes, shard.dim)
        index = torch.cat([shard.index(rank) for rank in range(self._group.world_size)]).to(local.device)
        shape = list(gathered.shape)
        shape[shard.dim] = int(index.max()) + 1
        return gathered.new_empty(shape).index_copy_(shard.dim, index, gathered)

    # ------------------------------------------------------------------ training
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip gradients by the norm of the whole model's gradient, as ``torch.nn.utils.clip_grad_norm_`` on
        the unsharded model.

        Returns that norm, equal on every rank. Every rank must call it.
        """
        self._require_shards("gradients")
        held = [(self._shard_of(name), p) for name, p in self.named_parameters() if p.grad is not None]
        if not held:
            return torch.zeros(())
        device = held[0][1].device
        divided = self._norm([self._counted(shard, p) for shard, p in held if shard.dim is not None], norm_type, device)
        whole = self._norm([p.grad for shard, p in held if shard.dim is None], norm_type, device)
        if norm_type == float("inf"):
            size = self._group.world_size
            parts = self._group.all_gather(divided.reshape(1), [1] * size, 0) if size > 1 else divided.reshape(1)
            norm = torch.maximum(parts.max(), whole)
        else:
            power = divided.double() ** norm_type
            if self._group.world_size > 1:
                power = self._group.all_reduce_sum_(power.reshape(1).contiguous())[0]
            norm = ((power + whole.double() ** norm_type) ** (1.0 / norm_type)).to(divided.dtype)
        torch.nn.utils.clip_grads_with_norm_([p for _, p in held], max_norm, norm)
        return norm

    def _counted(self, shard: Shard, parameter: Tensor) -> Tensor | None:
        """A gradient without what a lower rank counts."""
        grad, at = parameter.grad, shard.counted(self._group.rank)
        assert shard.dim is not None
        return grad if grad is None or at is None else grad.index_select(shard.dim, at.to(grad.device))

    @staticmethod
    def _norm(grads: list[Tensor | None], norm_type: float, device: torch.device) -> Tensor:
        tensors = [g for g in grads if g is not None and g.numel()]
        if not tensors:
            return torch.zeros((), device=device)
        return torch.nn.utils.get_total_norm(tensors, norm_type)
