"""Between a tensor and the flat, rank-major buffers that collectives move."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tensor_parallel.errors import ShapeError

_WIDER = {torch.int16: torch.int32, torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def raw_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as a flat ``uint8`` tensor, whatever its dtype and number of dimensions."""
    return tensor.view(-1).view(torch.uint8)


def reducible(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy in a dtype that every torch process group can sum. Raises :class:`ShapeError` for bool."""
    dtype = tensor.dtype
    if dtype == torch.bool:
        raise ShapeError("a bool tensor cannot be summed over ranks; convert it to an integer dtype first")
    if dtype.is_complex:
        return torch.view_as_real(tensor)
    if dtype.is_floating_point and dtype.itemsize == 1:
        return tensor.float()
    return tensor.to(_WIDER[dtype]) if dtype in _WIDER else tensor


def restore(tensor: Tensor, carrier: Tensor) -> None:
    """Copy a reduced ``carrier`` made by :func:`reducible` back, unless it shares ``tensor``'s memory."""
    if carrier.data_ptr() != tensor.data_ptr():
        tensor.copy_(carrier)


def as_dtype(carrier: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of ``dtype`` from what a collective made of one in :func:`reducible`'s."""
    return torch.view_as_complex(carrier) if dtype.is_complex else carrier.to(dtype)


def row_bytes(tensor: Tensor, dim: int) -> int:
    """Bytes of one index of ``tensor`` along ``dim``."""
    return prod(size for axis, size in enumerate(tensor.shape) if axis != dim) * tensor.element_size()


def join_gathered(flat: Tensor, local: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """Concatenate along ``dim`` the ranks' tensors lying one after the other in ``flat`` (bytes).

    ``local`` is this rank's own and gives the dtype and the other dimensions. A view of ``flat`` where the order allows
    it.
    """
    shape = list(local.shape)
    values = flat.view(local.dtype)
    if prod(shape[:dim]) == 1:
        shape[dim] = sum(sizes)
        return values.view(shape)
    if max(sizes) == min(sizes):
        stacked = values.view(len(sizes), *shape)
        shape[dim] = sum(sizes)
        return stacked.movedim(0, dim).reshape(shape)
    per_index = row_bytes(local, dim) // local.element_size()
    pieces = values.split([size * per_index for size in sizes])
    return torch.cat(
        [piece.view(*shape[:dim], size, *shape[dim + 1 :]) for piece, size in zip(pieces, sizes, strict=True)], dim
    )


def split_for_ranks(tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """The ranks' parts of ``tensor`` along ``dim``, each contiguous, in one flat tensor; a view if possible."""
    if prod(tensor.shape[:dim]) == 1:
        return tensor.view(-1)
    return torch.cat([part.reshape(-1) for part in tensor.split(list(sizes), dim)])
