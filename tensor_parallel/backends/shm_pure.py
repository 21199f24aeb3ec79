"""The compiled part of the shared-memory backend, in Python, for x86-64 machines on which it was not built.

It has the functions of ``_shm.c`` and its protocol (described there), in a layout of its own: all ranks use the one or
the other. Announcing and waiting are plain 8-byte stores and loads, which keep their order on x86-64 and nowhere else.

About twice as fast as TCP when each rank has a core, and no faster when cores are contended, so it is used only when
shared memory is asked for by name.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import select
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tensor_parallel.backends.shm_library import DTYPE_CODES

_ABORTED, _TIMED_OUT, _PEER_LOST, _MISMATCH = 1, 2, 3, 4
_BARRIER, _ALL_REDUCE, _ALL_GATHER, _REDUCE_SCATTER, _BROADCAST = range(1, 6)
_HEADER = 1024
_LINE = 128
_FAILURE, _REASON_LENGTH, _REASON = 0, 1, 16  # word, word, byte
_STEP, _SIGNATURES = 0, 1  # words of a rank's line
_SUM_AS = [
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
assert all(_SUM_AS[code].itemsize == dtype.itemsize for dtype, code in DTYPE_CODES.items())


def usable() -> bool:
    """Whether this machine keeps the order of stores and of loads, and has what the handshake needs."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


class _Region:
    """One rank's view of the mapping."""

    def __init__(self, fd: int, rank: int, ranks: int, slot: int, lifelines: Sequence[int], timeout: float) -> None:
        self.memory = mmap.mmap(fd, _bytes(ranks, slot))
        self.words = memoryview(self.memory)[: _HEADER + ranks * _LINE].cast("q")
        start = _slots_at(ranks)
        self.slots = torch.frombuffer(self.memory, dtype=torch.uint8, offset=start).view(ranks, 2, slot)
        self.rank, self.ranks, self.slot, self.timeout = rank, ranks, slot, timeout
        self.step = self.opened = self.exchange = 0
        self.rank_of = {fd: peer for peer, fd in enumerate(lifelines) if peer != rank}
        self.poll = select.poll()
        for lifeline in self.rank_of:
            self.poll.register(lifeline, 0)

    def word(self, rank: int, index: int) -> int:
        return (_HEADER + rank * _LINE) // 8 + index

    def step_of(self, rank: int) -> int:
        return int(self.words[self.word(rank, _STEP)])

    def buffer(self, rank: int) -> Tensor:
        return self.slots[rank, self.exchange & 1]

    def fail(self, failure: int, reason: bytes = b"") -> int:
        if self.words[_FAILURE] == 0:
            self.memory[_REASON : _REASON + len(reason)] = reason
            self.words[_REASON_LENGTH] = len(reason)
            self.words[_FAILURE] = failure
        return int(self.words[_FAILURE])

    def announce(self) -> None:
        self.step += 1
        self.words[self.word(self.rank, _STEP)] = self.step

    def wait_for(self, rank: int, step: int) -> int:
        tries, deadline = 0, 0.0
        while self.step_of(rank) < step:
            tries += 1
            if tries < 20:
                continue
            time.sleep(0 if tries < 400 else 5e-5)  # releases the interpreter lock either way
            if tries % 32:
                continue
            deadline = deadline or time.monotonic() + self.timeout
            status = int(self.words[_FAILURE]) or self.find_dead(step)
            if not status and time.monotonic() > deadline:
                status = _TIMED_OUT | rank << 8
            if status and self.step_of(rank) < step:
                return self.fail(status)
        return 0

    def find_dead(self, step: int) -> int:
        for fd, _ in self.poll.poll(0):
            if self.step_of(self.rank_of[fd]) < step:
                return _PEER_LOST | self.rank_of[fd] << 8
        return 0

    def wait_all(self, step: int) -> int:
        return next((status for rank in range(self.ranks) if (status := self.wait_for(rank, step))), 0)

    def begin(self, operation: int, detail: int, size: int) -> int:
        """Start an exchange: when it returns 0, this rank may write into its buffer."""
        status = int(self.words[_FAILURE]) or self.wait_all(self.opened)
        self.exchange += 1
        mark = operation << 56 | detail << 48 | size
        self.words[self.word(self.rank, _SIGNATURES + (self.exchange & 1))] = mark
        return status

    def open(self) -> int:
        """Announce what was written, and wait for everybody to have done the same in the same collective."""
        self.announce()
        self.opened = self.step
        status = self.wait_all(self.step)
        index = _SIGNATURES + (self.exchange & 1)
        for rank in range(self.ranks):
            if not status and self.words[self.word(rank, index)] != self.words[self.word(self.rank, index)]:
                status = self.fail(_MISMATCH | rank << 8)
        return status


class PureLibrary:
    """The functions of ``_shm.c``, by the same names."""

    def tp_region_bytes(self, ranks: int, slot: int) -> int:
        return _bytes(ranks, slot)

    def tp_open(
        self, fd: int, rank: int, ranks: int, slot: int, lifelines: Sequence[int], timeout: float, spins: int
    ) -> _Region:
        return _Region(fd, rank, ranks, slot, lifelines, timeout)

    def tp_close(self, region: _Region) -> None:
        """The mapping goes with the last reference to it."""

    def tp_abort(self, region: _Region, reason: bytes) -> None:
        region.fail(_ABORTED | region.rank << 8, reason)

    def tp_failure(self, region: _Region) -> int:
        return int(region.words[_FAILURE])

    def tp_reason(self, region: _Region) -> bytes:
        return bytes(region.memory[_REASON : _REASON + region.words[_REASON_LENGTH]])

    def tp_all_reduce(self, region: _Region, pointer: int, size: int, code: int, once_below: int) -> int:
        data = _at(pointer, size)
        for at, n in _chunks(size, region.slot):
            if status := region.begin(_ALL_REDUCE, code, size):
                return status
            region.buffer(region.rank)[:n] = data[at : at + n]
            if status := region.open():
                return status
            _sum([region.buffer(rank)[:n] for rank in range(region.ranks)], data[at : at + n], code)
        return 0

    def tp_all_gather(self, region: _Region, source: int, target: int, rows: int, widths: Any) -> int:
        stride = sum(widths)
        mine = _at(source, rows * widths[region.rank])
        parts = [torch.empty(rows * width, dtype=torch.uint8) for width in widths]
        for at, _ in _chunks(rows * max(widths), region.slot):
            if status := region.begin(_ALL_GATHER, 0, rows * stride):
                return status
            piece = mine[at : at + region.slot]
            region.buffer(region.rank)[: piece.numel()] = piece
            if status := region.open():
                return status
            for rank, part in enumerate(parts):
                place = part[at : at + region.slot]
                place.copy_(region.buffer(rank)[: place.numel()])
        columns = [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]
        torch.cat(columns, 1, out=_at(target, rows * stride).view(rows, stride))
        return 0

    def tp_reduce_scatter(self, region: _Region, source: int, target: int, rows: int, widths: Any, code: int) -> int:
        stride, share = sum(widths), region.slot // region.ranks // 64 * 64
        whole = _at(source, rows * stride).view(rows, stride)
        starts = accumulate(widths, initial=0)
        parts = [whole[:, start : start + width].reshape(-1) for start, width in zip(starts, widths, strict=False)]
        result = _at(target, rows * widths[region.rank])
        for at, _ in _chunks(rows * max(widths), share):
            if status := region.begin(_REDUCE_SCATTER, code, rows * stride):
                return status
            for rank, part in enumerate(parts):
                piece = part[at : at + share]
                region.buffer(region.rank)[rank * share : rank * share + piece.numel()] = piece
            if status := region.open():
                return status
            place = result[at : at + share]
            first = region.rank * share
            _sum([region.buffer(rank)[first : first + place.numel()] for rank in range(region.ranks)], place, code)
        return 0

    def tp_broadcast(self, region: _Region, pointer: int, size: int, source: int) -> int:
        data = _at(pointer, size)
        for at, n in _chunks(size, region.slot):
            if status := region.begin(_BROADCAST, source, size):
                return status
            if region.rank == source:
                region.buffer(source)[:n] = data[at : at + n]
            if status := region.open():
                return status
            if region.rank != source:
                data[at : at + n] = region.buffer(source)[:n]
        return 0

    def tp_barrier(self, region: _Region) -> int:
        return region.begin(_BARRIER, 0, 0) or region.open()


def _slots_at(ranks: int) -> int:
    return (_HEADER + ranks * _LINE + 4095) // 4096 * 4096


def _bytes(ranks: int, slot: int) -> int:
    return _slots_at(ranks) + ranks * 2 * slot


def _at(pointer: int, size: int) -> Tensor:
    """The memory of a tensor, as bytes."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype=torch.uint8)


def _chunks(size: int, most: int) -> Iterator[tuple[int, int]]:
    return ((at, min(most, size - at)) for at in range(0, size, most))


def _sum(sources: list[Tensor], target: Tensor, code: int) -> None:
    """In rank order; 16-bit floats in single precision, rounded once."""
    if target.numel() == 0:
        return
    dtype = _SUM_AS[code]
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    values = [source.view(dtype) for source in sources]
    total = target.view(dtype) if wide == dtype else torch.empty(values[0].shape, dtype=wide)
    torch.add(values[0].to(wide), values[1], out=total)
    for value in values[2:]:
        total += value
    if wide != dtype:
        target.view(dtype).copy_(total)
