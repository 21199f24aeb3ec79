"""Memory shared with a coordinator on this host: memfds that it passes over a socket, mapped for one generation.

A segment must be sealed against shrinking, or its owner could take pages away under a running forward (SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import stat
from collections.abc import Mapping

import torch

from protos.tensor_parallel.v1 import shard_pb2, tensor_pb2
from shardd import tensors
from shardd.errors import InvalidRequest

ALIGNMENT = 64
"""Bytes; outputs start at multiples of it, and inputs should."""
MAX_SEGMENTS = 64

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034  # linux/fcntl.h
_SEAL_SHRINK, _SEAL_GROW = 2, 4


class Arena:
    """The mapped segments, by number. For one thread, the executor's; registered with CUDA where they are for a GPU
    and it lets them."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._segments: list[mmap.mmap] = []
        self._device = device if device is not None and device.type == "cuda" else None
        self._registered: list[mmap.mmap] = []

    def add(self, descriptor: int) -> None:
        """Map the memfd ``descriptor``, which is then closed, as the next segment. Raises :class:`InvalidRequest`."""
        try:
            if len(self._segments) >= MAX_SEGMENTS:
                raise InvalidRequest(f"an arena has at most {MAX_SEGMENTS} segments")
            self._segments.append(_map(descriptor))
        finally:
            os.close(descriptor)
        if self._device is not None and _register(self._segments[-1], self._device):
            self._registered.append(self._segments[-1])

    def input(self, tensor: tensor_pb2.Tensor, ref: shard_pb2.ArenaRef) -> torch.Tensor:
        """A view of the bytes at ``ref``. Raises :class:`InvalidRequest` unless they are as many as ``tensor`` has."""
        if ref.byte_size != tensors.byte_size(tensor):
            raise InvalidRequest(
                f"input {tensor.name!r} needs {tensors.byte_size(tensor)} bytes, its place has {ref.byte_size}"
            )
        return tensors.decode(tensor, self._segment(ref), ref.offset)

    def place(self, values: Mapping[str, torch.Tensor], region: shard_pb2.ArenaRef) -> list[shard_pb2.ArenaRef] | None:
        """Copy ``values`` one after another into ``region``: where each went, or None if they do not all fit."""
        refs, end = layout(values, region.offset, region.segment)
        if end - region.offset > region.byte_size:
            return None
        copy_into(self._segment(region), values, refs)
        return refs

    def _segment(self, ref: shard_pb2.ArenaRef) -> mmap.mmap:
        if ref.segment >= len(self._segments) or ref.offset + ref.byte_size > len(self._segments[ref.segment]):
            raise InvalidRequest(
                f"segment {ref.segment} has no bytes {ref.offset} to {ref.offset + ref.byte_size}: not in the arena"
            )
        return self._segments[ref.segment]

    def release(self) -> None:
        """Let go of the mappings; each disappears with the last tensor that views it."""
        if self._device is not None:
            for segment in self._registered:
                _unregister(segment, self._device)
        self._registered.clear()
        self._segments.clear()


def layout(values: Mapping[str, torch.Tensor], start: int, segment: int) -> tuple[list[shard_pb2.ArenaRef], int]:
    """Where ``values`` go from byte ``start`` on, aligned, and where the last one ends."""
    refs = []
    end = start
    for value in values.values():
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + value.nbytes
        refs.append(shard_pb2.ArenaRef(offset=offset, byte_size=value.nbytes, segment=segment))
    return refs, end


def copy_into(memory: mmap.mmap, values: Mapping[str, torch.Tensor], refs: list[shard_pb2.ArenaRef]) -> None:
    """Copy each value, from any device and in any layout, to its place in ``memory``."""
    devices = set()
    for value, ref in zip(values.values(), refs, strict=True):
        if ref.byte_size:
            flat = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=ref.offset)
            flat.view(value.shape).copy_(value, non_blocking=True)
            if value.is_cuda:
                devices.add(value.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


def new_segment(size: int) -> tuple[int, mmap.mmap]:
    """A fresh memfd of ``size`` bytes that cannot change size, and its mapping."""
    descriptor = os.memfd_create("shardd-outputs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, max(size, 1))
    fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
    return descriptor, mmap.mmap(descriptor, max(size, 1))


def _map(descriptor: int) -> mmap.mmap:
    status = os.fstat(descriptor)
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError:
        seals = 0
    if not stat.S_ISREG(status.st_mode) or not seals & _SEAL_SHRINK:
        raise InvalidRequest("a segment of the arena must be a memfd sealed against shrinking")
    if status.st_size == 0:
        raise InvalidRequest("a segment of the arena is empty")
    try:
        return mmap.mmap(descriptor, status.st_size)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"a segment of the arena cannot be mapped: {error}") from None


def _address(segment: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(segment))


def _register(segment: mmap.mmap, device: torch.device) -> bool:
    """Pin the segment, so that copies to and from the device run at full speed and beside other work. Whether it could
    be: not under every driver (WSL, virtual GPUs), nor beyond the lockable memory; copies then take longer."""
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(_address(segment), len(segment), 0)) == 0:
            return True
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # takes the error, which CUDA would report of the next kernel
    return False


def _unregister(segment: mmap.mmap, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(_address(segment))
