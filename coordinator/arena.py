"""Memory shared with the ranks of this host, for the payloads of one generation.

Segments are memfds that nobody can shrink, so that no process can take pages away under another. Inputs lie in segments
that all ranks map; outputs in segments of which each rank has its own under the same number. A place is given back when
the last thing that refers to it is gone: the dispatched command, and every view of an output.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coordinator.errors import ResourceExhausted
from coordinator.types import Buffer
from coordinator.wire import flat

ALIGNMENT = 64
FIRST_SIZE = 64 << 20  # bytes; pages cost nothing until they are touched
MAX_SEGMENTS = 64
RECLAIM = 128 << 20  # bytes: a place as large as this gives its pages back to the system when it is freed

_F_ADD_SEALS = 1033  # linux/fcntl.h
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


@dataclass(slots=True)
class Segment:
    """``descriptors`` and ``memory`` by rank; for inputs both are the same for all ranks."""

    number: int
    size: int
    shared: bool
    descriptors: list[int]
    memory: list[mmap.mmap]
    free: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size), in order; neighbours are merged."""

    def take(self, size: int) -> int | None:
        for index, (offset, room) in enumerate(self.free):
            if room >= size:
                if room == size:
                    del self.free[index]
                else:
                    self.free[index] = (offset + size, room - size)
                return offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        insort(self.free, (offset, size))
        index = max(0, self.free.index((offset, size)) - 1)
        while index + 1 < len(self.free):
            (start, room), (following, more) = self.free[index], self.free[index + 1]
            if start + room == following:
                self.free[index : index + 2] = [(start, room + more)]
            elif start > offset:
                break
            else:
                index += 1


@dataclass(frozen=True, slots=True)
class Place:
    segment: Segment
    offset: int
    size: int


class Lease:
    """Places that belong to one command; they are free again when nothing refers to the lease any more."""

    __slots__ = ("_arena", "_kept", "_places", "outputs")

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._places: list[Place] = []
        self._kept: list[Lease] = []
        self.outputs: Place | None = None

    def put(self, segments: Sequence[Buffer], size: int) -> Place:
        """Copies ``segments``, of ``size`` bytes together, one after another. Raises ResourceExhausted."""
        place = self._arena.take(size, shared=True)
        self._places.append(place)
        target = memoryview(place.segment.memory[0])
        position = place.offset
        for segment in segments:
            data = flat(segment)
            target[position : position + len(data)] = data
            position += len(data)
        return place

    def room(self, size: int) -> memoryview:
        """``size`` bytes where ranks read inputs, for the caller to fill; the view keeps the lease."""
        place = self._arena.take(size, shared=True)
        self._places.append(place)
        return self._held(place.segment.memory[0], place.offset, size, place)

    def adopt(self, data: Buffer) -> Place | None:
        """Where ``data`` lies already, if it is a whole ``room`` of the same arena; it is then kept as long as this."""
        held = data.obj if isinstance(data, memoryview) else None
        if not isinstance(held, _Held) or held.lease is None or held.place is None or held.nbytes != len(data):
            return None
        if held.lease._arena is not self._arena:
            return None
        self._kept.append(held.lease)
        return held.place

    def expect(self, size: int) -> Place:
        """A place of ``size`` bytes in every rank's own output segment. Raises ResourceExhausted."""
        self.outputs = self._arena.take(size, shared=False)
        self._places.append(self.outputs)
        return self.outputs

    def view(self, rank: int, offset: int, size: int) -> memoryview:
        """What ``rank`` wrote at ``offset`` of its segment; the view keeps the lease. Raises ValueError outside it."""
        place = self.outputs
        if place is None or offset < place.offset or offset + size > place.offset + place.size:
            raise ValueError(f"output bytes {offset} to {offset + size} are not where they were expected")
        return self._held(place.segment.memory[rank], offset, size)

    def _held(self, memory: mmap.mmap, offset: int, size: int, place: Place | None = None) -> memoryview:
        held: Any = np.frombuffer(memory, np.uint8, size, offset).view(_Held)
        held.lease, held.place = self, place
        return memoryview(held)

    def __del__(self) -> None:
        for place in self._places:
            self._arena.give_back(place)


class _Held(np.ndarray):
    """An array that keeps its lease; a memoryview of it keeps the array."""

    lease: Lease | None = None
    place: Place | None = None
    """Of inputs that were written here directly."""


class Arena:
    """``reclaim``: large places give their pages back when freed; not where a device has them pinned."""

    def __init__(self, world_size: int, *, reclaim: bool = True) -> None:
        self._world_size = world_size
        self._reclaim = reclaim
        self._owner = threading.get_ident()
        self._returned: deque[Place] = deque()  # by other threads, which dropped the last view
        self.segments: list[Segment] = []

    def take(self, size: int, *, shared: bool) -> Place:
        """``size`` bytes in the inputs' memory (``shared``) or in every rank's own. Raises ResourceExhausted."""
        while self._returned:
            self.give_back(self._returned.popleft())
        rounded = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        for segment in self.segments:
            if segment.shared is shared:
                offset = segment.take(rounded)
                if offset is not None:
                    return Place(segment, offset, rounded)
        segment = self._add(max(FIRST_SIZE, 1 << (rounded - 1).bit_length()), shared)
        offset = segment.take(rounded)
        assert offset is not None
        return Place(segment, offset, rounded)

    def give_back(self, place: Place) -> None:
        if threading.get_ident() != self._owner:
            self._returned.append(place)
            return
        if self._reclaim and place.size >= RECLAIM:
            start = -(-place.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (place.offset + place.size) // mmap.PAGESIZE * mmap.PAGESIZE - start
            for memory in place.segment.memory[:1] if place.segment.shared else place.segment.memory:
                memory.madvise(mmap.MADV_REMOVE, start, length)
        place.segment.give_back(place.offset, place.size)

    def _add(self, size: int, shared: bool) -> Segment:
        if len(self.segments) >= MAX_SEGMENTS:
            raise ResourceExhausted("the memory shared with the ranks is used up")
        count = 1 if shared else self._world_size
        made: list[int] = []
        try:
            for _ in range(count):
                made.append(_memfd(size))
            memory = [mmap.mmap(descriptor, size) for descriptor in made]
        except (OSError, ValueError) as error:
            for descriptor in made:
                os.close(descriptor)
            raise ResourceExhausted(f"no memory to share {size} bytes with the ranks: {error}") from None
        copies = self._world_size if shared else 1
        segment = Segment(len(self.segments), size, shared, made * copies, memory * copies, [(0, size)])
        self.segments.append(segment)
        return segment

    def close(self) -> None:
        """No more segments will be sent. The memory itself goes with the last view of it."""
        for segment in self.segments:
            for descriptor in set(segment.descriptors):
                os.close(descriptor)
            segment.descriptors = []


def _memfd(size: int) -> int:
    descriptor = os.memfd_create("coordinator-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
