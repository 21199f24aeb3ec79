"""Linear and embedding layers of which each rank holds a part.

**Names.** They follow PyTorch's weight layout ``W[out, in]`` and are the reverse of Megatron-LM's and DTensor's:

========================  ======================  ===================  ==========================================
here                      shards                  part of ``W``        Megatron-LM / DTensor
========================  ======================  ===================  ==========================================
``RowParallelLinear``     output features, dim 0  rows                 ``ColumnParallelLinear`` / ``ColwiseParallel``
``ColumnParallelLinear``  input features, dim 1   columns              ``RowParallelLinear`` / ``RowwiseParallel``
========================  ======================  ===================  ==========================================

An MLP is a ``RowParallelLinear``, an elementwise function, and a ``ColumnParallelLinear``: one all-reduce forward, one
backward.

Feature counts are always the global ones. What does not divide by the world size is sharded unevenly (``split_sizes``),
never padded. With one rank the layers are ``nn.Linear`` and ``nn.Embedding`` and need no group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensor_parallel.collectives import all_gather_concat, all_reduce_sum, copy_to_ranks, scatter
from tensor_parallel.embedding import VocabParallelEmbedding
from tensor_parallel.errors import ConfigError, ShapeError
from tensor_parallel.group import Group
from tensor_parallel.partition import split_range, split_sizes
from tensor_parallel.placed import PlacedModule, rank_generator

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"]


class _ParallelLinear(PlacedModule):
    """A linear layer whose weight is split along ``_dim``."""

    _dim: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, world_size: int, rank: int, group: Group | None) -> None:
        super().__init__(world_size, rank, group)
        if in_features < 1 or out_features < 1:
            raise ConfigError(
                f"{type(self).__name__} needs positive sizes, got in_features={in_features} "
                f"and out_features={out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        sharded = out_features if self._dim == 0 else in_features
        self.sizes = split_sizes(sharded, world_size)
        self.shard_range = split_range(sharded, world_size, rank)

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` of the global sizes does, without making the whole matrix.

        Each rank draws its own values, also when every rank was seeded alike; the default generator advances by the
        same one draw everywhere. A replicated bias starts at zero, so that it cannot differ between ranks that were
        seeded differently.
        """
        bound = 1 / math.sqrt(self.in_features)
        generator = rank_generator(self.rank, self.weight.device)
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            if self.bias is not None and self._dim == 0:
                self.bias.uniform_(-bound, bound, generator=generator)
            elif self.bias is not None:
                self.bias.zero_()

    def _take(self, linear: nn.Linear) -> None:
        start, stop = self.shard_range
        with torch.no_grad():
            self.weight.copy_(linear.weight.narrow(self._dim, start, stop - start))
            if self.bias is not None and linear.bias is not None:
                self.bias.copy_(linear.bias[start:stop] if self._dim == 0 else linear.bias)
        self.weight.requires_grad_(linear.weight.requires_grad)
        if self.bias is not None and linear.bias is not None:
            self.bias.requires_grad_(linear.bias.requires_grad)
        self.train(linear.training)

    def _check_input(self, x: Tensor, expected: int, why: str) -> None:
        if x.dim() == 0 or x.shape[-1] != expected:
            raise ShapeError(
                f"{type(self).__name__}(in_features={self.in_features}, out_features={self.out_features}) "
                f"on rank {self.rank} of {self.world_size} expects a last dimension of {expected} ({why}), "
                f"got a tensor of shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        start, stop = self.shard_range
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}/{self.world_size}, holds {'rows' if self._dim == 0 else 'columns'} {start}:{stop}"
        )


class RowParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` of which each rank computes some output features (rows of ``W``).

    Megatron-LM calls this ``ColumnParallelLinear``; see the table in :mod:`tensor_parallel.layers`.

    ==========  ==============================================  ======================================================
    pass        ``gather_output=False``                         ``gather_output=True``
    ==========  ==============================================  ======================================================
    forward     no communication; ``y`` is this rank's slice    all-gather; ``y`` is whole on every rank
    backward    all-reduce of the gradient of ``x``             takes this rank's slice of the gradient of ``y``, then
                                                                all-reduce of the gradient of ``x``
    ==========  ==============================================  ======================================================

    Args:
        in_features, out_features: global sizes, of the unsharded layer.
        bias: whether there is one; it is sharded with the rows.
        world_size, rank: this rank's place.
        gather_output: return the whole output instead of this rank's slice.
        group: handle of the group to communicate in; the process's own when None.

    Attributes:
        weight: ``[sizes[rank], in_features]``: rows ``shard_range`` of the whole. ``bias``: ``[sizes[rank]]`` or None.

    Shapes: input ``[..., in_features]``, replicated; output ``[..., sizes[rank]]``, or ``[..., out_features]`` when
    gathered.

    Raises:
        ConfigError: impossible place or sizes. ShapeError: an input of another width.
    """

    _dim = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        world_size: int,
        rank: int,
        gather_output: bool = False,
        group: Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, world_size, rank, group)
        self.gather_output = gather_output
        rows = self.sizes[rank]
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, world_size: int, rank: int, *, gather_output: bool = False, group: Group | None = None
    ) -> RowParallelLinear:
        """This rank's rows of ``linear``, copied."""
        layer: RowParallelLinear = _empty(
            cls, linear, world_size=world_size, rank=rank, gather_output=gather_output, group=group
        )
        layer._take(linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x, self.in_features, "the whole input")
        if self.world_size == 1:
            return functional.linear(x, self.weight, self.bias)
        if x.requires_grad:
            x = copy_to_ranks(x, self.group)
        y = functional.linear(x, self.weight, self.bias)
        return all_gather_concat(y, -1, self.group, self.sizes) if self.gather_output else y


class ColumnParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` of which each rank sums over some input features (columns of ``W``).

    Megatron-LM calls this ``RowParallelLinear``; see the table in :mod:`tensor_parallel.layers`.

    ==========  ==========================================  ======================================================
    pass        ``input_is_parallel=True``                  ``input_is_parallel=False``
    ==========  ==========================================  ======================================================
    forward     one all-reduce; then the bias, once         takes this rank's slice of ``x``, then the same
    backward    no communication                            all-gather of the gradient of ``x``
    ==========  ==========================================  ======================================================

    Args:
        in_features, out_features: global sizes, of the unsharded layer.
        bias: whether there is one; it is replicated, and added once, after the sum. It starts at zero.
        world_size, rank: this rank's place.
        input_is_parallel: the input is already this rank's slice, as a ``RowParallelLinear`` leaves it.
        group: handle of the group to communicate in; the process's own when None.

    Attributes:
        weight: ``[out_features, sizes[rank]]``: columns ``shard_range`` of the whole. ``bias``: ``[out_features]`` or
            None.

    Shapes: input ``[..., sizes[rank]]``, or ``[..., in_features]`` when not parallel; output ``[..., out_features]``,
    replicated.

    Raises:
        ConfigError: impossible place or sizes. ShapeError: an input of another width.
    """

    _dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        world_size: int,
        rank: int,
        input_is_parallel: bool = True,
        group: Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, world_size, rank, group)
        self.input_is_parallel = input_is_parallel
        columns = self.sizes[rank]
        self.weight = nn.Parameter(torch.empty(out_features, columns, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        world_size: int,
        rank: int,
        *,
        input_is_parallel: bool = True,
        group: Group | None = None,
    ) -> ColumnParallelLinear:
        """This rank's columns of ``linear``, copied, and its whole bias."""
        layer: ColumnParallelLinear = _empty(
            cls, linear, world_size=world_size, rank=rank, input_is_parallel=input_is_parallel, group=group
        )
        layer._take(linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.input_is_parallel:
            self._check_input(
                x, self.sizes[self.rank], "this rank's slice; input_is_parallel=False takes the whole input"
            )
        else:
            self._check_input(x, self.in_features, "the whole input")
        if self.world_size == 1:
            return functional.linear(x, self.weight, self.bias)
        group = self.group
        if not self.input_is_parallel:
            x = scatter(x, -1, group, self.sizes)
        y = all_reduce_sum(functional.linear(x, self.weight), group, in_place=True)
        if self.bias is None:
            return y
        return y + self.bias if torch.is_grad_enabled() else y.add_(self.bias)


def _empty(cls: Any, linear: nn.Linear, **options: Any) -> Any:
    """An uninitialised layer with ``linear``'s sizes, device and dtype."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: an nn.Linear is needed, not {type(linear).__name__}")
    return nn.utils.skip_init(
        cls,
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
        **options,
    )
