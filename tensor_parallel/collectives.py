"""Differentiable collectives: the only functions through which layers and planned graphs talk to other ranks.

The convention of every backward here: outside a sharded region, all ranks compute the same replicated loss. So the
gradient that arrives at the output of an all-reduce is already the whole gradient, and its backward is the identity.
(Summing it again would scale gradients by the world size, although a per-collective ``gradcheck`` would like that
better.) Judge whole layers against the unsharded layer.

=========================  ====================================  =======================================================
function                   forward                               backward
=========================  ====================================  =======================================================
``all_reduce_sum``         sum over ranks                        identity
``copy_to_ranks``          identity                              sum over ranks
``all_gather_concat``      concatenate the ranks' parts          this rank's part (or reduce-scatter, if asked)
``take_slice``             this rank's part                      all-gather
``reduce_scatter_sum``     this rank's part of the sum           all-gather
``broadcast_tensor``       rank ``src_rank``'s tensor            identity on ``src_rank``, zero elsewhere
=========================  ====================================  =======================================================

``all_reduce_sum`` and ``copy_to_ranks`` are g and f of Shoeybi et al., "Megatron-LM" (2019); the gather and
reduce-scatter pair is g-bar of Korthikanti et al., "Reducing Activation Recomputation" (2022).

``group=None`` means :func:`~tensor_parallel.group.default_group`. All raise
:class:`~tensor_parallel.errors.GroupUnbound` without a formed group, :class:`~tensor_parallel.errors.CollectiveError`
when a peer fails, and :class:`~tensor_parallel.errors.ShapeError` for shapes that cannot be meant. In a group of one
rank they check their arguments and do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from tensor_parallel.errors import ShapeError
from tensor_parallel.group import Group, default_group
from tensor_parallel.partition import split_offsets, split_sizes

Index = Tensor | tuple[int, int]
"""Which indices of a dimension: a tensor of them, or a range ``(start, stop)``."""


def all_reduce_sum(tensor: Tensor, group: Group | None = None, *, in_place: bool = False) -> Tensor:
    """Sum of every rank's ``tensor``, of the same shape; the backward is the identity.

    ``in_place=True`` lets the result take over the memory of a contiguous ``tensor`` that nothing else needs, when no
    gradient is recorded; use the returned tensor either way.
    """
    group = group or default_group()
    if group.world_size == 1:
        return tensor
    if _recording(tensor):
        return _apply(_AllReduceSum, tensor, group)
    return group.all_reduce_sum_(tensor if in_place and tensor.is_contiguous() else _fresh(tensor))


def copy_to_ranks(tensor: Tensor, group: Group | None = None) -> Tensor:
    """``tensor`` itself, replicated on every rank, entering a sharded region; the backward sums over ranks."""
    if not _recording(tensor):
        return tensor
    group = group or default_group()
    return tensor if group.world_size == 1 else _apply(_CopyToRanks, tensor, group)


def all_gather_concat(
    tensor: Tensor,
    dim: int,
    group: Group | None = None,
    sizes: Sequence[int] | None = None,
    *,
    grad: Literal["slice", "reduce_scatter"] = "slice",
) -> Tensor:
    """Every rank's ``tensor`` concatenated along ``dim``, in rank order.

    Args:
        sizes: length along ``dim`` on each rank; when None, a tiny collective asks first.
        grad: ``"slice"`` when what follows is replicated; ``"reduce_scatter"`` when it is sharded (sequence
            parallelism), so that each rank's gradient is only its own contribution.
    """
    group = group or default_group()
    dim = _dim(tensor, dim)
    if group.world_size == 1:
        return tensor
    if sizes is None:
        sizes = group.exchange_sizes(tensor.shape[dim], tensor.device)
    sizes = _sizes(sizes, group)
    if tensor.shape[dim] != sizes[group.rank]:
        raise ShapeError(
            f"rank {group.rank} gathers {_shape(tensor)} along dim {dim}, but is said to hold {sizes[group.rank]} there"
        )
    if _recording(tensor):
        return _apply(_AllGather, tensor, dim, group, sizes, grad)
    return group.all_gather(tensor.contiguous(), sizes, dim)


def scatter(tensor: Tensor, dim: int, group: Group | None = None, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part of a replicated ``tensor`` along ``dim``; the backward is an all-gather.

    ``sizes`` is each rank's length along ``dim``; as even as possible when None.
    """
    group = group or default_group()
    dim = _dim(tensor, dim)
    if group.world_size == 1:
        return tensor
    sizes = _sizes(sizes or split_sizes(tensor.shape[dim], group.world_size), group)
    if sum(sizes) != tensor.shape[dim]:
        raise ShapeError(f"sizes {sizes} do not add up to dim {dim} of {_shape(tensor)}")
    if _recording(tensor):
        return _apply(_Scatter, tensor, dim, group, sizes)
    return _part(tensor, dim, group, sizes)


def take_slice(tensor: Tensor, dim: int, index: Index | Sequence[Index], group: Group | None = None) -> Tensor:
    """This rank's part, by index, of a replicated ``tensor`` along ``dim``.

    Args:
        index: this rank's indices, as a 1-D integer tensor or a range ``(start, stop)``; or a list of every rank's. The
            backward of the former is an all-reduce of the whole, of the latter an all-gather of the parts. Ranks may
            share indices.
    """
    group = group or default_group()
    dim = _dim(tensor, dim)
    everyone = list(index) if isinstance(index, list) else None
    if everyone is not None and len(everyone) != group.world_size:
        raise ShapeError(f"take_slice got the indices of {len(everyone)} ranks in a group of {group.world_size}")
    mine: Index = everyone[group.rank] if everyone is not None else index  # type: ignore[assignment]
    if group.world_size > 1 and _recording(tensor):
        return _apply(_TakeSlice, tensor, dim, group, mine, everyone)
    return _take(tensor, dim, mine)


def reduce_scatter_sum(
    tensor: Tensor, dim: int, group: Group | None = None, sizes: Sequence[int] | None = None
) -> Tensor:
    """This rank's part along ``dim`` of the sum of every rank's ``tensor``; the backward is an all-gather.

    ``sizes`` is each rank's length along ``dim``; as even as possible when None.
    """
    group = group or default_group()
    dim = _dim(tensor, dim)
    if group.world_size == 1:
        return tensor
    sizes = _sizes(sizes or split_sizes(tensor.shape[dim], group.world_size), group)
    if sum(sizes) != tensor.shape[dim]:
        raise ShapeError(f"sizes {sizes} do not add up to dim {dim} of {_shape(tensor)}")
    if _recording(tensor):
        return _apply(_ReduceScatter, tensor, dim, group, sizes)
    return group.reduce_scatter_sum(tensor.contiguous(), sizes, dim)


def broadcast_tensor(tensor: Tensor, src_rank: int = 0, group: Group | None = None) -> Tensor:
    """Rank ``src_rank``'s ``tensor``; the others give one of the same shape and dtype, whose values do not matter."""
    group = group or default_group()
    if _recording(tensor) and group.world_size > 1:
        return _apply(_Broadcast, tensor, src_rank, group)
    return group.broadcast_(_fresh(tensor) if group.world_size > 1 else tensor, src_rank)


def synchronize_across_ranks(group: Group | None = None) -> None:
    """Return once every rank has called it. On CUDA, this rank's queued work is finished first."""
    group = group or default_group()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    group.barrier()


def _apply(function: type[Function], *args: Any) -> Tensor:
    return cast(Tensor, function.apply(*args))


def _recording(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _fresh(tensor: Tensor) -> Tensor:
    """A contiguous copy that a collective may overwrite."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _shape(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}"


def _dim(tensor: Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ShapeError(f"{_shape(tensor)} has no dim {dim}")
    return dim % tensor.dim()


def _sizes(sizes: Sequence[int], group: Group) -> tuple[int, ...]:
    if len(sizes) != group.world_size:
        raise ShapeError(f"sizes {tuple(sizes)} name {len(sizes)} ranks in a group of {group.world_size}")
    return tuple(sizes)


def _part(tensor: Tensor, dim: int, group: Group, sizes: tuple[int, ...]) -> Tensor:
    return tensor.narrow(dim, split_offsets(sizes)[group.rank], sizes[group.rank])


def _take(tensor: Tensor, dim: int, index: Index) -> Tensor:
    if isinstance(index, Tensor):
        return tensor.index_select(dim, index)
    start, stop = index
    if not 0 <= start <= stop <= tensor.shape[dim]:
        raise ShapeError(f"range {index} lies outside dim {dim} of {_shape(tensor)}")
    return tensor.narrow(dim, start, stop - start)


def _add_into(whole: Tensor, dim: int, index: Index, part: Tensor) -> None:
    if isinstance(index, Tensor):
        whole.index_add_(dim, index, part)
    else:
        whole.narrow(dim, index[0], index[1] - index[0]).add_(part)


def _length(index: Index) -> int:
    return index.numel() if isinstance(index, Tensor) else index[1] - index[0]


class _AllReduceSum(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: Group) -> Tensor:
        return group.all_reduce_sum_(_fresh(tensor))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _CopyToRanks(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.group), None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group, sizes: tuple[int, ...], grad: str) -> Tensor:
        ctx.dim, ctx.group, ctx.sizes, ctx.grad = dim, group, sizes, grad
        return group.all_gather(tensor.contiguous(), sizes, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad == "reduce_scatter":
            part = reduce_scatter_sum(grad, ctx.dim, ctx.group, ctx.sizes)
        else:
            part = _part(grad, ctx.dim, ctx.group, ctx.sizes)
        return part, None, None, None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group, sizes: tuple[int, ...]) -> Tensor:
        ctx.dim, ctx.group, ctx.sizes = dim, group, sizes
        return _part(tensor, dim, group, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather_concat(grad, ctx.dim, ctx.group, ctx.sizes), None, None, None


class _TakeSlice(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group, mine: Index, everyone: list[Index] | None) -> Tensor:
        ctx.dim, ctx.group, ctx.mine, ctx.everyone, ctx.shape = dim, group, mine, everyone, tensor.shape
        return _take(tensor, dim, mine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = grad.new_zeros(ctx.shape)
        if ctx.everyone is None:
            _add_into(whole, ctx.dim, ctx.mine, grad)
            whole = all_reduce_sum(whole, ctx.group, in_place=True)
        else:
            sizes = [_length(index) for index in ctx.everyone]
            gathered = all_gather_concat(grad, ctx.dim, ctx.group, sizes)
            for index, part in zip(ctx.everyone, gathered.split(sizes, ctx.dim), strict=True):
                _add_into(whole, ctx.dim, index, part)
        return whole, None, None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group, sizes: tuple[int, ...]) -> Tensor:
        ctx.dim, ctx.group, ctx.sizes = dim, group, sizes
        return group.reduce_scatter_sum(tensor.contiguous(), sizes, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather_concat(grad, ctx.dim, ctx.group, ctx.sizes), None, None, None


class _Broadcast(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, src_rank: int, group: Group) -> Tensor:
        ctx.is_source = group.rank == src_rank
        return group.broadcast_(_fresh(tensor), src_rank)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.is_source else torch.zeros_like(grad), None, None
