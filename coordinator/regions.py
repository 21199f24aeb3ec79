"""Shared memory that clients offer: inputs are taken from it, outputs are put into it.

Nothing is mapped here. Bytes move by ``pread`` and ``pwrite``, so a client that shrinks or removes its region gets an
error of its own, where a mapping would end this process with SIGBUS. Off unless a name prefix is configured; only
objects in /dev/shm whose names begin with it are opened, and symbolic links never.
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from collections.abc import Callable, Mapping

from coordinator.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from coordinator.types import InferRequest, InferResult, RegionRef
from coordinator.wire import flat

SHARED_MEMORY = "/dev/shm"
MOST = 1024  # regions: each is an open file
MAX_NAME = 256
Room = Callable[[int], memoryview | None]
_KEY = re.compile(r"/?([A-Za-z0-9_][A-Za-z0-9_.\-]{0,200})")


class Region:
    """An open shared-memory object; it closes when nothing refers to it, so a request outlives an unregister."""

    def __init__(self, key: str, offset: int, byte_size: int, descriptor: int) -> None:
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, part: RegionRef, what: str, room: memoryview | None = None) -> memoryview:
        """The part's bytes, copied to ``room`` if it is given. Raises InvalidArgument when the part is outside the
        region, or the object has shrunk.
        """
        self.check(part, what)
        view = memoryview(bytearray(part.byte_size)) if room is None else room
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], self.offset + part.offset + done)
            if got == 0:
                raise InvalidArgument(f"{what}: shared memory region {part.region!r} has shrunk")
            done += got
        return view

    def write(self, part: RegionRef, data: memoryview, what: str) -> None:
        """Raises InvalidArgument when the part is too small or outside the region, or the object has shrunk."""
        self.check(part, what)
        if len(data) > part.byte_size:
            raise InvalidArgument(f"{what} takes {len(data)} bytes, its part of {part.region!r} has {part.byte_size}")
        start = self.offset + part.offset
        if os.fstat(self._descriptor).st_size < start + len(data):
            raise InvalidArgument(f"{what}: shared memory region {part.region!r} has shrunk")
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], start + done)

    def check(self, part: RegionRef, what: str) -> None:
        if part.offset + part.byte_size > self.byte_size:
            raise InvalidArgument(
                f"{what}: bytes {part.offset} to {part.offset + part.byte_size} are outside shared memory region "
                f"{part.region!r} of {self.byte_size}"
            )


class Regions:
    """Those registered, by name. ``prefix`` None: none can be."""

    def __init__(self, prefix: str | None) -> None:
        self._prefix = prefix
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises ServiceError."""
        if self._prefix is None:
            raise FailedPrecondition("client shared memory is off here (coordinator --enable-shared-memory PREFIX)")
        if not name or len(name) > MAX_NAME:
            raise InvalidArgument("a shared memory region needs a name, and a short one")
        if name in self._regions:
            raise AlreadyExists(f"shared memory region {name!r} already in manager")
        if len(self._regions) >= MOST:
            raise ResourceExhausted(f"{MOST} shared memory regions are registered already; unregister some")
        found = _KEY.fullmatch(key)
        if found is None:
            raise InvalidArgument(f"{key!r} is no name of a shared memory object")
        if not found[1].startswith(self._prefix):
            raise PermissionDenied(f"shared memory objects that begin with {self._prefix!r} may be registered here")
        self._regions[name] = Region(key, offset, byte_size, _open(name, found[1], offset, byte_size))

    def unregister(self, name: str) -> None:
        """All of them when ``name`` is empty; NotFound for one that is not there."""
        if not name:
            self._regions.clear()
        elif self._regions.pop(name, None) is None:
            raise NotFound(f"Unable to find shared memory region: {name!r}")

    def listed(self) -> dict[str, tuple[str, RegionRef]]:
        return {name: (r.key, RegionRef(name, r.offset, r.byte_size)) for name, r in self._regions.items()}

    def find(self, part: RegionRef) -> Region:
        try:
            return self._regions[part.region]
        except KeyError:
            raise InvalidArgument(f"Unable to find shared memory region: {part.region!r}") from None

    def rooms(self, request: InferRequest, room: Room) -> dict[str, memoryview | None]:
        """Where ``take`` shall write each shared input. Raises ServiceError."""
        found: dict[str, memoryview | None] = {}
        for value in request.inputs:
            if value.region is not None and value.region.byte_size == value.byte_size:
                self.find(value.region).check(value.region, f"input {value.name!r}")
                found[value.name] = room(value.byte_size)
        return found

    def take(self, request: InferRequest, rooms: Mapping[str, memoryview | None] | None = None) -> dict[str, Region]:
        """Puts the bytes of shared inputs in place of their regions; returns the regions that outputs go to, by output.

        ``rooms`` is where the bytes go, by input; else to memory of their own. Blocks for as long as the copy takes.
        Raises InvalidArgument.
        """
        rooms = rooms or {}
        targets = {name: self.find(part) for name, part in request.output_regions.items()}
        for value in request.inputs:
            if value.region is not None:
                what = f"input {value.name!r}"
                if value.region.byte_size != value.byte_size:
                    raise InvalidArgument(
                        f"{what} takes {value.byte_size} bytes, its part of {value.region.region!r} has "
                        f"{value.region.byte_size}"
                    )
                data = self.find(value.region).read(value.region, what, rooms.get(value.name))
                value.data, value.region = data, None
        return targets


def put(result: InferResult, request: InferRequest, targets: dict[str, Region]) -> None:
    """Moves outputs into their regions. Blocks for as long as the copy takes. Raises InvalidArgument."""
    for value in result.outputs:
        target = targets.get(value.name)
        if target is not None and value.data is not None:
            part = request.output_regions[value.name]
            target.write(part, flat(value.data), f"output {value.name!r}")
            value.data, value.region = None, RegionRef(part.region, part.offset, value.byte_size)


def _open(name: str, key: str, offset: int, byte_size: int) -> int:
    try:
        descriptor = os.open(f"{SHARED_MEMORY}/{key}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArgument(f"Unable to open shared memory region: {name!r}: {error.strerror}") from None
    about = os.fstat(descriptor)
    problem = "is no shared memory object" if not stat.S_ISREG(about.st_mode) else ""
    if not problem and offset + byte_size > about.st_size:
        problem = f"has {about.st_size} bytes, fewer than {offset} + {byte_size}"
    if problem:
        os.close(descriptor)
        raise InvalidArgument(f"shared memory region {name!r}: {key!r} {problem}")
    return descriptor
