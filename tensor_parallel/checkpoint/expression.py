"""A tensor as an expression over stored tensors, of which any box can be read without reading the rest.

Model code rarely wants what is stored: experts are stored one by one and used stacked, fused weights are stored
whole and used in parts. Each node below knows how to turn "this box of me, into that memory" into :class:`Transfer`
jobs, each a strided region of one file; the sum of their sizes is the size of the box. Only :class:`Computed`, for
an operation that is not data movement, reads its sources whole, when its turn comes and for that tensor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tensor_parallel.checkpoint.stored import StoredTensor

Box = tuple[tuple[int, int], ...]
"""Half-open index range per dimension."""


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


@dataclass(frozen=True)
class Transfer:
    """Copy a strided region of a stored tensor into ``out`` (any strides, device or dtype).

    ``region`` is a tensor on the meta device: its shape, strides and offset, in elements of the stored tensor, say
    which.
    """

    source: StoredTensor
    region: Tensor
    out: Tensor


@dataclass(frozen=True)
class Compute:
    """Evaluate ``node`` whole and copy ``box`` of it into ``out``."""

    node: Computed
    box: Box
    out: Tensor


Job = Transfer | Compute


class Node:
    """An expression. ``shape`` and ``dtype`` describe its value."""

    shape: torch.Size
    dtype: torch.dtype

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        """The copies that fill ``out``, which has the shape of ``box``, with that part of the value."""
        raise NotImplementedError

    def leaves(self) -> Iterator[StoredTensor]:
        """The stored tensors the value depends on."""
        raise NotImplementedError

    def narrow(self, dim: int, start: int, length: int) -> Node:
        box = tuple((start, start + length) if d == dim else (0, size) for d, size in enumerate(self.shape))
        return self if box == whole(self.shape) else Narrowed(self, box)

    def permute(self, dims: tuple[int, ...]) -> Node:
        return self if dims == tuple(range(len(dims))) else Permuted(self, dims)

    def reshape(self, shape: tuple[int, ...]) -> Node:
        return self if shape == tuple(self.shape) else _reshaped(self, shape)

    def cast(self, dtype: torch.dtype) -> Node:
        return self if dtype == self.dtype else Cast(self, dtype)


class View(Node):
    """A strided view of one stored tensor; ``region`` is its geometry, on the meta device."""

    def __init__(self, source: StoredTensor, region: Tensor | None = None) -> None:
        self.source = source
        self.region = torch.empty(source.shape, dtype=source.dtype, device="meta") if region is None else region
        self.shape, self.dtype = self.region.shape, self.region.dtype

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        region = self.region
        for dim, (start, stop) in enumerate(box):
            region = region.narrow(dim, start, stop - start)
        if region.numel():
            yield Transfer(self.source, region, out)

    def leaves(self) -> Iterator[StoredTensor]:
        yield self.source

    def narrow(self, dim: int, start: int, length: int) -> Node:
        return View(self.source, self.region.narrow(dim, start, length))

    def permute(self, dims: tuple[int, ...]) -> Node:
        return View(self.source, self.region.permute(dims))

    def reshape(self, shape: tuple[int, ...]) -> Node:
        try:
            return View(self.source, self.region.view(shape))
        except RuntimeError:  # the strides do not allow it: torch would copy here
            return super().reshape(shape)


class Concatenated(Node):
    """Parts one after the other along ``dim``."""

    def __init__(self, parts: Sequence[Node], dim: int) -> None:
        self.parts, self.dim = tuple(parts), dim
        first = self.parts[0]
        self.dtype = first.dtype
        total = sum(part.shape[dim] for part in self.parts)
        self.shape = torch.Size([total if d == dim else size for d, size in enumerate(first.shape)])

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        start, stop = box[self.dim]
        position = 0
        for part in self.parts:
            size = part.shape[self.dim]
            first, last = max(start, position), min(stop, position + size)
            if first < last:
                inner = (*box[: self.dim], (first - position, last - position), *box[self.dim + 1 :])
                yield from part.jobs(inner, out.narrow(self.dim, first - start, last - first))
            position += size

    def leaves(self) -> Iterator[StoredTensor]:
        for part in self.parts:
            yield from part.leaves()

    def permute(self, dims: tuple[int, ...]) -> Node:
        return Concatenated([part.permute(dims) for part in self.parts], dims.index(self.dim))


class Narrowed(Node):
    """A box of another value."""

    def __init__(self, child: Node, box: Box) -> None:
        self.child, self.box, self.dtype = child, box, child.dtype
        self.shape = torch.Size([stop - start for start, stop in box])

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        inner = tuple((base + start, base + stop) for (base, _), (start, stop) in zip(self.box, box, strict=True))
        return self.child.jobs(inner, out)

    def leaves(self) -> Iterator[StoredTensor]:
        return self.child.leaves()


class Permuted(Node):
    """Another value with its dimensions reordered, as ``Tensor.permute``."""

    def __init__(self, child: Node, dims: tuple[int, ...]) -> None:
        self.child, self.dims, self.dtype = child, dims, child.dtype
        self.shape = torch.Size([child.shape[dim] for dim in dims])

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        back = [self.dims.index(dim) for dim in range(len(self.dims))]
        return self.child.jobs(tuple(box[dim] for dim in back), out.permute(back))

    def leaves(self) -> Iterator[StoredTensor]:
        return self.child.leaves()


class Merged(Node):
    """Another value with its dimensions ``first .. last`` (inclusive) flattened into one."""

    def __init__(self, child: Node, first: int, last: int) -> None:
        self.child, self.first, self.last, self.dtype = child, first, last, child.dtype
        self.merged = tuple(child.shape[first : last + 1])
        self.shape = torch.Size([*child.shape[:first], prod(self.merged), *child.shape[last + 1 :]])

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        start, stop = box[self.first]
        for inner in _flat_range_as_boxes(start, stop, self.merged):
            sizes = [high - low for low, high in inner]
            begin = sum(low * prod(self.merged[d + 1 :]) for d, (low, _) in enumerate(inner))
            part = out.narrow(self.first, begin - start, prod(sizes)).unflatten(self.first, sizes)
            yield from self.child.jobs((*box[: self.first], *inner, *box[self.first + 1 :]), part)

    def leaves(self) -> Iterator[StoredTensor]:
        return self.child.leaves()


class Cast(Node):
    """Another value in another dtype. The copy into the destination converts, so nothing else is done unless casts
    are nested.
    """

    def __init__(self, child: Node, dtype: torch.dtype) -> None:
        self.child, self.dtype, self.shape = child, dtype, child.shape

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        rounds_twice = self.dtype != out.dtype or any(leaf.dtype != self.child.dtype for leaf in self.child.leaves())
        if rounds_twice:
            return Computed(lambda value: value.to(self.dtype), [self.child], self.shape, self.dtype).jobs(box, out)
        return self.child.jobs(box, out)

    def leaves(self) -> Iterator[StoredTensor]:
        return self.child.leaves()


class Computed(Node):
    """``function`` of other values, each given whole: anything that is not data movement."""

    def __init__(
        self, function: Callable[..., Any], children: Sequence[Node], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.function, self.children, self.dtype = function, tuple(children), dtype
        self.shape = torch.Size(shape)

    def jobs(self, box: Box, out: Tensor) -> Iterator[Job]:
        if out.numel():
            yield Compute(self, box, out)

    def leaves(self) -> Iterator[StoredTensor]:
        for child in self.children:
            yield from child.leaves()


def _reshaped(node: Node, shape: tuple[int, ...]) -> Node:
    """``node`` in another shape: by merging one group of neighbouring dimensions where that is what it is, else
    computed.
    """
    old = tuple(node.shape)
    for first in range(len(old)):
        last = first + len(old) - len(shape)
        if last > first and shape == (*old[:first], prod(old[first : last + 1]), *old[last + 1 :]):
            return Merged(node, first, last)
    return Computed(lambda value: value.reshape(shape), [node], shape, node.dtype)


def _flat_range_as_boxes(start: int, stop: int, sizes: tuple[int, ...]) -> Iterator[Box]:
    """Boxes, in order, that together are the row-major positions ``start .. stop`` of an array of ``sizes``."""
    if start >= stop:
        return
    if len(sizes) == 1:
        yield ((start, stop),)
        return
    row = prod(sizes[1:])
    head, tail = -(-start // row), stop // row  # whole rows are head .. tail
    if head > tail:  # inside one row
        for inner in _flat_range_as_boxes(start - tail * row, stop - tail * row, sizes[1:]):
            yield ((tail, tail + 1), *inner)
        return
    for inner in _flat_range_as_boxes(start - (head - 1) * row, row, sizes[1:]) if start < head * row else ():
        yield ((head - 1, head), *inner)
    if head < tail:
        yield ((head, tail), *whole(sizes[1:]))
    for inner in _flat_range_as_boxes(0, stop - tail * row, sizes[1:]):
        yield ((tail, tail + 1), *inner)
