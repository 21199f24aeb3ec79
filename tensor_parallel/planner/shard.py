"""How one stored tensor is divided among the ranks of a group: which global indices along one dimension, in which
order, each rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from tensor_parallel.errors import ShapeError
from tensor_parallel.partition import split_offsets, split_sizes

Run = tuple[int, int]
"""Half-open range ``(start, stop)`` of global indices."""


@dataclass(frozen=True)
class Shard:
    """Placement of one parameter or buffer.

    ``dim`` is the divided dimension, or ``None`` when every rank holds the whole tensor (``runs`` is then empty).
    ``runs[rank]`` lists the global index runs the rank holds, in the order in which they lie in its local tensor: a
    fused ``[q | k | v]`` weight gives each rank one run of each. Ranks may hold the same indices (replicated key
    heads) and may hold none.
    """

    dim: int | None
    runs: tuple[tuple[Run, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.dim is None:
            if self.runs:
                raise ShapeError("a replicated tensor has no runs")
            return
        if self.dim < 0:
            raise ShapeError(f"the dimension of a shard is counted from the front, got {self.dim}")
        for rank, runs in enumerate(self.runs):
            for start, stop in runs:
                if not 0 <= start < stop:
                    raise ShapeError(
                        f"rank {rank} has the run ({start}, {stop}); a run is not empty and starts at 0 or later"
                    )

    @classmethod
    def replicated(cls) -> Shard:
        """Every rank holds the whole tensor."""
        return cls(None)

    @classmethod
    def contiguous(cls, dim: int, sizes: Sequence[int]) -> Shard:
        """Rank ``r`` holds the next ``sizes[r]`` indices along ``dim``; a size of 0 leaves that rank without any."""
        starts = split_offsets(tuple(sizes))
        return cls(
            dim, tuple(((start, start + size),) if size else () for start, size in zip(starts, sizes, strict=True))
        )

    @classmethod
    def even(cls, dim: int, size: int, world_size: int) -> Shard:
        """``size`` indices along ``dim`` in ``world_size`` consecutive parts that differ by one at most."""
        return cls.contiguous(dim, split_sizes(size, world_size))

    @classmethod
    def from_indices(cls, dim: int, indices: Iterable[Sequence[int] | torch.Tensor]) -> Shard:
        """From each rank's global indices, in the order it holds them."""
        return cls(dim, tuple(_runs_of(index) for index in indices))

    def local_size(self, rank: int) -> int:
        """How many indices along ``dim`` the rank holds; only for a divided tensor."""
        return sum(stop - start for start, stop in self.runs[rank])

    def local_shape(self, shape: Sequence[int], rank: int) -> torch.Size:
        """Shape of the rank's part of a tensor of global ``shape``. Raises :class:`ShapeError` when a run lies
        outside it.
        """
        if self.dim is None:
            return torch.Size(shape)
        self._check(shape, rank)
        return torch.Size([self.local_size(rank) if dim == self.dim else size for dim, size in enumerate(shape)])

    def index(self, rank: int) -> torch.Tensor:
        """The rank's global indices along ``dim``, int64, in the order it holds them; only for a divided tensor."""
        return torch.cat(
            [torch.empty(0, dtype=torch.int64), *(torch.arange(start, stop) for start, stop in self.runs[rank])]
        )

    def counted(self, rank: int) -> torch.Tensor | None:
        """Local positions of the indices that no lower rank holds too, which a sum over ranks may count; None: all."""
        if self.dim is None:
            return None
        lower = torch.cat([torch.empty(0, dtype=torch.int64), *(self.index(r) for r in range(rank))])
        mine = ~torch.isin(self.index(rank), lower)
        return None if bool(mine.all()) else mine.nonzero().flatten()

    def take(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """The rank's part of ``full``, contiguous and sharing no memory with it, so that the full tensor can be
        freed.
        """
        if self.dim is None:
            return full.clone(memory_format=torch.contiguous_format)
        self._check(full.shape, rank)
        parts = [full.narrow(self.dim, start, stop - start) for start, stop in self.runs[rank]]
        if not parts:
            return full.new_empty(self.local_shape(full.shape, rank))
        return parts[0].clone(memory_format=torch.contiguous_format) if len(parts) == 1 else torch.cat(parts, self.dim)

    def _check(self, shape: Sequence[int], rank: int) -> None:
        if self.dim is None or self.dim >= len(shape):
            raise ShapeError(f"a shard along dimension {self.dim} does not fit a tensor of shape {tuple(shape)}")
        if not 0 <= rank < len(self.runs):
            raise ShapeError(f"rank {rank} is outside the {len(self.runs)} ranks of the shard")
        last = max((stop for _, stop in self.runs[rank]), default=0)
        if last > shape[self.dim]:
            raise ShapeError(f"index {last - 1} is outside dimension {self.dim} of a tensor of shape {tuple(shape)}")


def _runs_of(index: Sequence[int] | torch.Tensor) -> tuple[Run, ...]:
    values = torch.as_tensor(index, dtype=torch.int64)
    if values.numel() == 0:
        return ()
    breaks = (torch.diff(values) != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), values.numel()]
    return tuple((int(values[a]), int(values[b - 1]) + 1) for a, b in pairwise(edges))
