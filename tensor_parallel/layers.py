"""Linear and embedding layers of which each rank holds a part.

**Names.** They follow PyTorch's weight layout ``W[out, in]`` and are the reverse of Megatron-LM's and DTensor's:

========================  ======================  ===================  ==========================================
here                      shards                  part of ``W``        Megatron-LM / DTensor
========================  ======================  ===================  ==========================================
``RowParallelLinear``     output features, dim 0  rows                 ``ColumnParallelLinear`` / ``ColwiseParallel``
``ColumnParallelLinear``  input features, dim 1   columns              ``RowParallelLinear`` / ``RowwiseParallel``
========================  ======================  ===================  ==========================================

An MLP is a ``RowParallelLinear``, an elementwise function, and a ``ColumnParallelLinear``: one all-reduce forward, one backward.

Feature counts are always the global ones. What does not divide by the world size is sharded unevenly (``split_sizes``), never
padded. With one rank the layers are ``nn.Linear`` and ``nn.Embedding`` and need no group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensor_parallel.collectives import all_gather_concat, all_reduce_sum, copy_to_ranks, scatter
from tensor_parallel.errors import ConfigError, ShapeError
from tensor_parallel.group import Group, default_group
from tensor_parallel.partition import check_rank, split_range, split_sizes


class _Parallel(nn.Module):
    """What the sharded layers share: a place among the ranks and a group handle, found at the first need when not given."""

    def __init__(self, world_size: int, rank: int, group: Group | None) -> None:
        super().__init__()
        check_rank(rank, world_size)
        self.world_size = world_size
        self.rank = rank
        self._group = group
        if group is not None:
            self._check_place(group)

    @property
    def group(self) -> Group:
        group = self._group or default_group()
        self._check_place(group)
        return group

    @group.setter
    def group(self, group: Group) -> None:
        self._check_place(group)
        self._group = group

    def _check_place(self, group: Group) -> None:
        if (group.rank, group.world_size) != (self.rank, self.world_size):
            raise ConfigError(
                f"{type(self).__name__} was built for rank {self.rank} of {self.world_size}, "
                f"but its group is rank {group.rank} of {group.world_size}; call init_tensor_parallel() or pass group="
            )


class _ParallelLinear(_Parallel):
    """A linear layer whose weight is split along ``_dim``."""

    _dim: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, world_size: int, rank: int, group: Group | None) -> None:
        super().__init__(world_size, rank, group)
        if in_features < 1 or out_features < 1:
            raise ConfigError(
                f"{type(self).__name__} needs positive sizes, got in_features={in_features}, out_features={out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        sharded = out_features if self._dim == 0 else in_features
        self.sizes = split_sizes(sharded, world_size)
        self.shard_range = split_range(sharded, world_size, rank)

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` of the global sizes does, without making the whole matrix.

        Each rank draws its own values, also when every rank was seeded alike; the default generator advances by the same one
        draw everywhere. A replicated bias starts at zero, so that it cannot differ between ranks that were seeded differently.
        """
        bound = 1 / math.sqrt(self.in_features)
        generator = _rank_generator(self.rank, self.weight.device)
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
                f"{type(self).__name__}(in_features={self.in_features}, out_features={self.out_features}) on rank {self.rank} of "
                f"{self.world_size} expects a last dimension of {expected} ({why}), got a tensor of shape {tuple(x.shape)}"
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

    Shapes: input ``[..., in_features]``, replicated; output ``[..., sizes[rank]]``, or ``[..., out_features]`` when gathered.

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
        layer = _empty(cls, linear, world_size=world_size, rank=rank, gather_output=gather_output, group=group)
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
        weight: ``[out_features, sizes[rank]]``: columns ``shard_range`` of the whole. ``bias``: ``[out_features]`` or None.

    Shapes: input ``[..., sizes[rank]]``, or ``[..., in_features]`` when not parallel; output ``[..., out_features]``, replicated.

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
        layer = _empty(cls, linear, world_size=world_size, rank=rank, input_is_parallel=input_is_parallel, group=group)
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


class VocabParallelEmbedding(_Parallel):
    """``nn.Embedding`` of which each rank holds some rows; one all-reduce forward, no communication backward.

    The rows are split as ``RowParallelLinear`` splits its rows, so an output head of that class can share this ``weight``.

    Args:
        num_embeddings, embedding_dim: global sizes.
        padding_idx: row that receives no gradient, as in ``nn.Embedding``.
        world_size, rank, group: as in :class:`RowParallelLinear`.

    Attributes:
        weight: ``[sizes[rank], embedding_dim]``: rows ``shard_range`` of the whole.

    Shapes: ids ``[...]``, replicated; output ``[..., embedding_dim]``, replicated.

    Raises:
        ConfigError: impossible place, sizes or ``padding_idx``. IndexError: an id outside the vocabulary, as ``nn.Embedding``
        raises it (on CUDA a device-side assertion, also as there): it must never become a silent row of zeros.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        world_size: int,
        rank: int,
        group: Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(world_size, rank, group)
        if num_embeddings < 1 or embedding_dim < 1:
            raise ConfigError(f"VocabParallelEmbedding needs positive sizes, got {num_embeddings} x {embedding_dim}")
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ConfigError(f"padding_idx {padding_idx} lies outside a vocabulary of {num_embeddings}")
            padding_idx %= num_embeddings
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.sizes = split_sizes(num_embeddings, world_size)
        self.shard_range = split_range(num_embeddings, world_size, rank)
        self.weight = nn.Parameter(torch.empty(self.sizes[rank], embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, world_size: int, rank: int, *, group: Group | None = None
    ) -> VocabParallelEmbedding:
        """This rank's rows of ``embedding``, copied. Raises :class:`ConfigError` for ``max_norm``, which needs whole rows' updates."""
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ConfigError("VocabParallelEmbedding does not support max_norm, scale_grad_by_freq or sparse")
        layer = nn.utils.skip_init(
            cls,
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            world_size=world_size,
            rank=rank,
            group=group,
            device=embedding.weight.device,
            dtype=embedding.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(embedding.weight[slice(*layer.shard_range)])
        layer.weight.requires_grad_(embedding.weight.requires_grad)
        return layer.train(embedding.training)

    def reset_parameters(self) -> None:
        """Standard normal, as ``nn.Embedding``; each rank draws its own values. The padding row is zero."""
        with torch.no_grad():
            self.weight.normal_(generator=_rank_generator(self.rank, self.weight.device))
            local = self._local_padding()
            if local is not None:
                self.weight[local].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        if self.world_size == 1:
            return functional.embedding(ids, self.weight, self.padding_idx)
        _check_ids(ids, self.num_embeddings)
        start, stop = self.shard_range
        group = self.group
        if start == stop:
            partial = self.weight.new_zeros(*ids.shape, self.embedding_dim)
            return all_reduce_sum(
                partial.requires_grad_(self.weight.requires_grad and torch.is_grad_enabled()), group, in_place=True
            )
        elsewhere = (ids < start) | (ids >= stop)
        rows = functional.embedding((ids - start).masked_fill(elsewhere, 0), self.weight, self._local_padding())
        return all_reduce_sum(rows.masked_fill(elsewhere.unsqueeze(-1), 0), group, in_place=True)

    def _local_padding(self) -> int | None:
        start, stop = self.shard_range
        if self.padding_idx is None or not start <= self.padding_idx < stop:
            return None
        return self.padding_idx - start

    def extra_repr(self) -> str:
        start, stop = self.shard_range
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}/{self.world_size}, holds rows {start}:{stop}"


def _empty(cls: Any, linear: nn.Linear, **options: Any) -> Any:
    """An uninitialised layer with ``linear``'s sizes, device and dtype."""
    return nn.utils.skip_init(
        cls,
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
        **options,
    )


def _rank_generator(rank: int, device: torch.device) -> torch.Generator | None:
    """A generator of this rank's own, seeded by one draw of the default one; None on meta, where nothing is drawn."""
    if device.type == "meta":
        return None
    seed = int(torch.randint(0, 2**31, ()).item())
    return torch.Generator(device).manual_seed(seed * 65_537 + rank)


def _check_ids(ids: Tensor, bound: int) -> None:
    if ids.numel() == 0:
        return
    if ids.is_cuda:
        torch._assert_async(((ids >= 0) & (ids < bound)).all(), f"an id lies outside a vocabulary of {bound}")  # type: ignore[call-overload]
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= bound:
        raise IndexError(f"ids must lie in [0, {bound}), got one of {low if low < 0 else high}")
