"""An embedding of which each rank holds some of the vocabulary."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensor_parallel.collectives import all_reduce_sum
from tensor_parallel.errors import ConfigError
from tensor_parallel.group import Group
from tensor_parallel.partition import split_range, split_sizes
from tensor_parallel.placed import PlacedModule, rank_generator


class VocabParallelEmbedding(PlacedModule):
    """``nn.Embedding`` of which each rank holds some rows; one all-reduce forward, no communication backward.

    The rows are split as ``RowParallelLinear`` splits its rows, so an output head of that class can share this
    ``weight``.

    Args:
        num_embeddings, embedding_dim: global sizes.
        padding_idx: row that receives no gradient, as in ``nn.Embedding``.
        world_size, rank, group: as in :class:`RowParallelLinear`.

    Attributes:
        weight: ``[sizes[rank], embedding_dim]``: rows ``shard_range`` of the whole.

    Shapes: ids ``[...]``, replicated; output ``[..., embedding_dim]``, replicated.

    Raises:
        ConfigError: impossible place, sizes or ``padding_idx``. IndexError: an id outside the vocabulary, as
        ``nn.Embedding`` raises it (on CUDA a device-side assertion, also as there): it must never become a silent row
        of zeros.
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
        """This rank's rows of ``embedding``, copied. Raises :class:`ConfigError` for options not supported here."""
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
        layer.train(embedding.training)
        return cast(VocabParallelEmbedding, layer)

    def reset_parameters(self) -> None:
        """Standard normal, as ``nn.Embedding``; each rank draws its own values. The padding row is zero."""
        with torch.no_grad():
            self.weight.normal_(generator=rank_generator(self.rank, self.weight.device))
            local = self._local_padding()
            if local is not None:
                self.weight[local].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        if self.world_size == 1:
            return functional.embedding(ids, self.weight, self.padding_idx)
        _check_ids(ids, self.num_embeddings)
        start, stop = self.shard_range
        group = self.group
        if start == stop:  # more ranks than words: nothing to add, but still part of the sum and of its backward
            nothing = self.weight.new_zeros(*ids.shape, self.embedding_dim) + self.weight.sum()
            return all_reduce_sum(nothing, group, in_place=True)
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
        place = f"rank={self.rank}/{self.world_size}, holds rows {start}:{stop}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {place}"


def _check_ids(ids: Tensor, bound: int) -> None:
    if ids.numel() == 0:
        return
    if ids.is_cuda:
        torch._assert_async(((ids >= 0) & (ids < bound)).all(), f"an id lies outside a vocabulary of {bound}")
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= bound:
        raise IndexError(f"ids must lie in [0, {bound}), got one of {low if low < 0 else high}")
