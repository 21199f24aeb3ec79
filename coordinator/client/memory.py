"""Shared memory between a client and a coordinator on the same host: a large tensor's bytes then stay out of gRPC."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from coordinator.client.errors import InvalidInputError, RequestError
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

DIRECTORY = Path("/dev/shm")
DEFAULT_PREFIX = "tensor_parallel_"
_ALIGNMENT = 64  # bytes; a cache line, and enough for any vector instruction


class SharedRegion:
    """Memory of ``byte_size`` bytes, registered with the coordinator while it is open. Made by `Client.shared_memory`.

    `array` gives arrays in it. Such an array as an input of ``forward`` is sent by reference, and as ``into`` it takes
    an output. The coordinator has to allow it (``--enable-shared-memory PREFIX``).
    """

    def __init__(self, byte_size: int, prefix: str) -> None:
        """Raises InvalidInputError for a size that is none, RequestError (RESOURCE_EXHAUSTED) where memory is short."""
        if byte_size < 1:
            raise InvalidInputError(f"a region of {byte_size} bytes holds nothing")
        self.name = self.key = prefix + uuid.uuid4().hex
        self.byte_size = byte_size
        self._used = 0
        descriptor = os.open(DIRECTORY / self.key, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, byte_size)  # now, rather than SIGBUS at the first touch
            self.buffer = mmap.mmap(descriptor, byte_size)
        except OSError as error:
            self._unlink()
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"no {byte_size} bytes in {DIRECTORY}: {error}"
            ) from None
        finally:
            os.close(descriptor)
        self._address: int = np.frombuffer(self.buffer, np.uint8).__array_interface__["data"][0]

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The next free part as an array, its contents undefined. Raises InvalidInputError when none is left."""
        kind: np.dtype[Any] = np.dtype(dtype)
        start, size = -(-self._used // _ALIGNMENT) * _ALIGNMENT, math.prod(shape) * kind.itemsize
        if start + size > self.byte_size:
            raise InvalidInputError(f"{size} bytes are wanted, {max(0, self.byte_size - start)} are left in the region")
        self._used = start + size
        return np.ndarray(tuple(shape), kind, self.buffer, start)

    def reset(self) -> None:
        """Makes all of it free again; arrays given out before share their memory with new ones."""
        self._used = 0

    def offset_of(self, array: npt.NDArray[Any]) -> int | None:
        """Where in the region ``array`` lies; None if it does not, or not in one piece."""
        start: int = array.__array_interface__["data"][0] - self._address
        inside = start >= 0 and start + array.nbytes <= self.byte_size
        return start if inside and array.flags.c_contiguous else None

    def close(self) -> None:
        """Removes the name; the memory goes with the last array in it."""
        self._unlink()
        with contextlib.suppress(BufferError):  # arrays still look at it
            self.buffer.close()

    def registration(self) -> pb.RegisterSharedMemoryRequest:
        return pb.RegisterSharedMemoryRequest(name=self.name, key=self.key, byte_size=self.byte_size)

    def _unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(DIRECTORY / self.key)


@dataclass(frozen=True, slots=True)
class Regions:
    """The open regions of a client."""

    open: dict[str, SharedRegion]

    def find(self, array: npt.NDArray[Any]) -> tensor_pb2.SharedMemoryRef | None:
        for region in self.open.values():
            offset = region.offset_of(array)
            if offset is not None:
                return tensor_pb2.SharedMemoryRef(region=region.name, offset=offset, byte_size=array.nbytes)
        return None

    def targets(self, into: Mapping[str, npt.NDArray[Any]]) -> Iterable[tuple[str, tensor_pb2.SharedMemoryRef]]:
        """Where outputs go. Raises InvalidInputError for an array that is in no region."""
        for name, array in into.items():
            ref = self.find(array) if isinstance(array, np.ndarray) else None
            if ref is None:
                raise InvalidInputError(f"into[{name!r}] is no array of an open shared region of this client")
            yield name, ref

    def view(self, ref: tensor_pb2.SharedMemoryRef) -> memoryview:
        """The bytes of ``ref``. Raises RequestError (INTERNAL) for a region that is not open."""
        region = self.open.get(ref.region)
        if region is None or ref.offset + ref.byte_size > region.byte_size:
            raise RequestError(grpc.StatusCode.INTERNAL, f"an output is in {ref.region!r}, which is no region of ours")
        return memoryview(region.buffer)[ref.offset : ref.offset + ref.byte_size]


@contextlib.contextmanager
def allow_registered() -> Iterator[None]:
    """A retried registration may find that the first one was heard after all."""
    try:
        yield
    except RequestError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise


def forgotten(error: RequestError) -> bool:
    """Whether the coordinator knows nothing of a region, as after its restart; registering again cures that."""
    return error.code() is grpc.StatusCode.INVALID_ARGUMENT and "Unable to find shared memory region" in error.details()
