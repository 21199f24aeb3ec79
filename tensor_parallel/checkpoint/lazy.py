"""A ``torch.Tensor`` that holds an expression instead of data.

``transformers`` describes how a stored checkpoint becomes a model's weights in code (which names, in what order,
stacked and cut how). Run on these tensors, that very code yields expressions, so that every conversion it knows,
and those to come, is done slice by slice without a copy of its rules here. Values are immutable and, whatever torch
would say of their strides, contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tensor_parallel.checkpoint.expression import Computed, Concatenated, Node, View
from tensor_parallel.checkpoint.stored import StoredTensor

aten = torch.ops.aten


class LazyTensor(torch.Tensor):
    """A tensor of known shape and dtype whose value is read from files, in part or whole, when asked for."""

    node: Node

    @staticmethod
    def __new__(cls, node: Node) -> LazyTensor:
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, node.shape, dtype=node.dtype, device=torch.device("cpu")
        )
        made.node = node
        return made

    @classmethod
    def stored(cls, tensor: StoredTensor) -> LazyTensor:
        """The value of a stored tensor."""
        return cls(View(tensor))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # printing must not read the file
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        return rule(*args, **(kwargs or {})) if rule else _computed(func, args, kwargs or {})


def _same(tensor: LazyTensor, *_: Any, **__: Any) -> LazyTensor:
    return LazyTensor(tensor.node)


def _view(tensor: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    inferred = torch.empty(tensor.shape, device="meta").view(shape)  # resolves -1
    return LazyTensor(tensor.node.reshape(tuple(inferred.shape)))


def _permute(tensor: LazyTensor, dims: Sequence[int]) -> LazyTensor:
    return LazyTensor(tensor.node.permute(tuple(dim % tensor.ndim for dim in dims)))


def _transpose(tensor: LazyTensor, dim0: int = 0, dim1: int = 1) -> LazyTensor:
    dims = list(range(tensor.ndim))
    if tensor.ndim > 1:
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(tensor, dims)


def _unsqueeze(tensor: LazyTensor, dim: int) -> LazyTensor:
    dim %= tensor.ndim + 1
    return _view(tensor, (*tensor.shape[:dim], 1, *tensor.shape[dim:]))


def _squeeze(tensor: LazyTensor, dims: int | Sequence[int] | None = None) -> LazyTensor:
    listed = range(tensor.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % tensor.ndim for dim in listed}
    return _view(tensor, [size for dim, size in enumerate(tensor.shape) if size != 1 or dim not in gone])


def _narrow(tensor: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    return LazyTensor(tensor.node.narrow(dim % tensor.ndim, start, length))


def _slice(
    tensor: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyTensor:
    if step != 1:
        return _computed(aten.slice.Tensor, (tensor, dim, start, end, step), {})  # type: ignore[no-any-return]
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return _narrow(tensor, dim, first, max(last - first, 0))


def _select(tensor: LazyTensor, dim: int, index: int) -> LazyTensor:
    dim %= tensor.ndim
    part = _narrow(tensor, dim, index % tensor.shape[dim], 1)
    return _view(part, (*tensor.shape[:dim], *tensor.shape[dim + 1 :]))


def _split(tensor: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    total = tensor.shape[dim]
    return [_narrow(tensor, dim, at, min(size, total - at)) for at in range(0, total, size)]


def _split_sizes(tensor: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_narrow(tensor, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> LazyTensor:
    meta = torch.cat(
        [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors], dim
    )  # checks, and promotes dtypes
    parts = [_node(t).cast(meta.dtype) for t in tensors if t.shape != (0,)]
    return LazyTensor(Concatenated(parts, dim % meta.ndim))


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> LazyTensor:
    return _cat([_unsqueeze(LazyTensor(_node(t)), dim) for t in tensors], dim)


def _to_copy(tensor: LazyTensor, *, dtype: torch.dtype | None = None, **_: Any) -> LazyTensor:
    return LazyTensor(tensor.node.cast(dtype or tensor.dtype))


def _equal(left: Tensor, right: Tensor) -> bool:
    from tensor_parallel.checkpoint.transfer import read_box

    if left.shape != right.shape:
        return False
    a, b = _node(left), _node(right)
    leaves = [list(a.leaves()), list(b.leaves())]
    if (
        isinstance(a, View)
        and isinstance(b, View)
        and leaves[0] == leaves[1]
        and a.region.stride() == b.region.stride()
    ):
        return a.region.storage_offset() == b.region.storage_offset()
    rows = a.shape[0] if a.shape else 1
    step = max(1, rows * _COMPARED_AT_ONCE // max(1, a.shape.numel()))
    for start in range(0, rows, step):  # a part at a time: embeddings can be gigabytes
        box = tuple((start, min(start + step, rows)) if d == 0 else (0, size) for d, size in enumerate(a.shape))
        if not torch.equal(read_box(a, box), read_box(b, box)):
            return False
    return True


_COMPARED_AT_ONCE = 1 << 22


def _node(tensor: Tensor) -> Node:
    """The expression of a lazy tensor, or one of a tensor that is already in memory, found among lazy ones."""
    return tensor.node if isinstance(tensor, LazyTensor) else Computed(lambda: tensor, [], tensor.shape, tensor.dtype)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of any other operation, to be evaluated on whole tensors when it is read."""
    if func._schema.is_mutable:
        if isinstance(args[0], LazyTensor) and isinstance(args[0].node, Computed):
            return args[0]  # initialising a value derived from stored ones (a weight norm) changes nothing that is kept
        raise NotImplementedError(f"{func} changes a tensor in place; tensors of a checkpoint are read only")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, LazyTensor)]

    def call(values: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for at, value in zip(places, values, strict=True):
            filled[at] = value
        full_args, full_kwargs = pytree.tree_unflatten(filled, spec)
        return func(*full_args, **full_kwargs)

    example = call([torch.empty(leaves[at].shape, dtype=leaves[at].dtype, device="meta") for at in places])
    outputs, out_spec = pytree.tree_flatten(example)
    if not all(isinstance(out, Tensor) for out in outputs):
        raise NotImplementedError(f"{func} on a tensor that is not read yet does not return tensors")
    children = [leaves[at].node for at in places]

    def output(index: int) -> Callable[..., Tensor]:
        return lambda *values: pytree.tree_leaves(call(values))[index]

    lazy = [LazyTensor(Computed(output(i), children, out.shape, out.dtype)) for i, out in enumerate(outputs)]
    return pytree.tree_unflatten(lazy, out_spec)


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys([aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default], _same),
    **dict.fromkeys([aten.view.default, aten._unsafe_view.default], _view),
    aten.permute.default: _permute,
    **dict.fromkeys([aten.transpose.int, aten.t.default], _transpose),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], _squeeze),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.unbind.int: _unbind,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten._to_copy.default: _to_copy,
    aten.equal.default: _equal,
}
