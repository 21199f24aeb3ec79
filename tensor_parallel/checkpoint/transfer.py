"""Copying a strided region of a file into memory, reading little more than what is asked for.

A region whose bytes lie together is read at once, straight into its place where that is a dense piece of host
memory of the same dtype, else through a staging buffer. A region of short pieces far apart (the columns of a wide
matrix) is read piece by piece; pieces near each other are read with the gaps between them, which costs less than a
system call each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tensor_parallel.checkpoint.expression import Box, Compute, Job, Node, Transfer, whole
from tensor_parallel.checkpoint.stored import StoredTensor

STAGING_BYTES = 8 << 20
SMALL_GAP_BYTES = 2048  # reading so much more costs about as much as another call


@dataclass(frozen=True)
class Read:
    """At most about ``STAGING_BYTES`` of a transfer: a region that is read at once, or row by row when ``rows`` is
    set.
    """

    source: StoredTensor
    region: Tensor
    out: Tensor
    rows: bool

    @property
    def position(self) -> tuple[int, int]:
        """Where in which file it starts: the order in which a disk likes to be read."""
        return self.source.file.descriptor, self.source.offset + int(
            self.region.storage_offset()
        ) * self.region.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.out.numel() * self.out.element_size()


class Staging:
    """A thread's reusable buffer for bytes that cannot be read straight into their place; page-locked for copies to
    a GPU.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, nbytes: int, pinned: bool) -> Tensor:
        """``nbytes`` of uint8, valid until the next call."""
        held = self._buffer
        if held is None or held.numel() < nbytes or (pinned and not held.is_pinned()):
            held = self._buffer = torch.empty(max(nbytes, STAGING_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return held[:nbytes]


def split(transfer: Transfer) -> Iterator[Read]:
    """The reads that make up a transfer."""
    region, out = _file_order(transfer.region, transfer.out)
    yield from _split(transfer.source, region, out)


def run(read: Read, staging: Staging) -> None:
    """Perform one read. Raises :class:`~tensor_parallel.errors.CheckpointError` if the file is shorter than it was."""
    if read.rows:
        _read_rows(read, staging)
    else:
        _read_span(read, staging)


def read_whole(node: Node) -> Tensor:
    """The value of an expression, in host memory."""
    return read_box(node, whole(node.shape))


def read_box(node: Node, box: Box) -> Tensor:
    """Part of the value of an expression, in host memory."""
    out = torch.empty([stop - start for start, stop in box], dtype=node.dtype)
    staging = Staging()
    for job in node.jobs(box, out):
        perform(job, staging)
    return out


def perform(job: Job, staging: Staging, between: Callable[[], None] | None = None) -> None:
    """Perform a whole job in this thread; ``between`` is called before each read, and may raise."""
    if isinstance(job, Compute):
        evaluate(job)
        return
    for read in split(job):
        if between:
            between()
        run(read, staging)


def evaluate(job: Compute) -> None:
    """Read the sources of a computed value, compute it, keep the part asked for."""
    with torch.inference_mode():
        value = job.node.function(*(read_whole(child) for child in job.node.children))
        for dim, (start, stop) in enumerate(job.box):
            value = value.narrow(dim, start, stop - start)
        job.out.copy_(value)


def _file_order(region: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Both with their dimensions in the order of the file (outermost first), and size-1 dimensions dropped."""
    dims = [dim for dim in range(region.ndim) if region.shape[dim] != 1]
    strides = region.stride()
    dims.sort(key=lambda dim: -strides[dim])
    shape = [region.shape[dim] for dim in dims]
    ordered = region.as_strided(shape, [region.stride(dim) for dim in dims], region.storage_offset())
    return ordered, out.as_strided(shape, [out.stride(dim) for dim in dims], out.storage_offset())


def _split(source: StoredTensor, region: Tensor, out: Tensor) -> Iterator[Read]:
    dense = _dense_from(region)
    if dense == 0:
        yield from _chunks(source, region, out, rows=False)
        return
    gap = (region.stride(dense - 1) - _span(region, dense)) * region.dtype.itemsize
    if dense == 1 and gap <= SMALL_GAP_BYTES:
        yield from _chunks(source, region, out, rows=False)
    elif dense == 1:
        yield from _chunks(source, region, out, rows=True)
    else:
        for index in range(region.shape[0]):
            yield from _split(source, *_file_order(region[index], out[index]))


def _chunks(source: StoredTensor, region: Tensor, out: Tensor, rows: bool) -> Iterator[Read]:
    """Cut along the outermost dimension into pieces that fit the staging buffer, then along the next where one is
    too large.
    """
    itemsize = region.dtype.itemsize
    if region.ndim == 0:
        yield Read(source, region, out, rows=False)
        return
    each = (_span(region, 1) if rows else region.stride(0)) * itemsize
    step = STAGING_BYTES // max(each, 1)
    if step == 0 and region.ndim > 1:
        for index in range(region.shape[0]):
            yield from _chunks(source, region[index], out[index], rows=False)
        return
    step = max(step, 1)
    for start in range(0, region.shape[0], step):
        length = min(step, region.shape[0] - start)
        yield Read(source, region.narrow(0, start, length), out.narrow(0, start, length), rows)


def _dense_from(region: Tensor) -> int:
    """First dimension from which on the region is dense: 0 when all of it is one run of bytes."""
    expected, dense = 1, region.ndim
    for dim in reversed(range(region.ndim)):
        if region.stride(dim) != expected:
            break
        expected *= region.shape[dim]
        dense = dim
    return dense


def _span(region: Tensor, first: int) -> int:
    """Elements from the first to the last of one index of the dimensions before ``first``, gaps included."""
    return 1 + sum((region.shape[dim] - 1) * region.stride(dim) for dim in range(first, region.ndim))


def _read_span(read: Read, staging: Staging) -> None:
    region, out = read.region, read.out
    dense = _dense_from(region) == 0
    if dense and _is_plain(out, region.dtype) and out.is_contiguous():
        read.source.file.read_into(_memory(out, out.numel() * out.element_size()), read.position[1])
        return
    raw = staging.take(_span(region, 0) * region.dtype.itemsize, out.is_cuda)
    read.source.file.read_into(_memory(raw, raw.numel()), read.position[1])
    out.copy_(raw.view(region.dtype).as_strided(region.shape, region.stride()))


def _read_rows(read: Read, staging: Staging) -> None:
    region, out, file = read.region, read.out, read.source.file
    itemsize = region.dtype.itemsize
    count, length = region.shape[0], _span(region, 1) * itemsize
    direct = _is_plain(out, region.dtype) and out[0].is_contiguous()
    target = out if direct else staging.take(count * length, out.is_cuda)
    step = out.stride(0) * itemsize if direct else length
    memory = _memory(target, (count - 1) * step + length)
    offset, file_step = read.position[1], region.stride(0) * itemsize
    for row in range(count):
        file.read_into(memory[row * step : row * step + length], offset + row * file_step)
    if not direct:
        out.copy_(target.view(region.dtype).view(out.shape))


def _is_plain(out: Tensor, dtype: torch.dtype) -> bool:
    return out.device.type == "cpu" and out.dtype == dtype


def _memory(tensor: Tensor, nbytes: int) -> memoryview:
    """The bytes from the tensor's first element on. The caller keeps the tensor alive."""
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
