"""CPU ranks of one host, through shared memory: an order of magnitude less latency than TCP.

The algorithms and the memory order are described in ``_shm.c``, which does the work, with the interpreter lock
released.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import Store

from tensor_parallel.backends import shm_pure
from tensor_parallel.backends.layout import as_dtype, reducible, restore
from tensor_parallel.backends.shm_handshake import Host, exchange_hosts, share
from tensor_parallel.backends.shm_library import DTYPE_CODES, MAX_RANKS, load_library
from tensor_parallel.errors import (
    CollectiveAborted,
    CollectiveError,
    CollectiveMismatch,
    CollectiveTimeout,
    ConfigError,
    PeerLost,
    ShapeError,
)

SLOT_BYTES = 1 << 20
ONCE_BELOW = 64 << 10
"""All-reduces below this many bytes take one step instead of two."""
_SPINS_ALONE, _SPINS_CROWDED = 4000, 256
_ABORTED, _TIMED_OUT, _PEER_LOST, _MISMATCH = 1, 2, 3, 4


def available_library() -> Any:
    """The compiled part, else the same in Python where that is sound, else None."""
    return load_library() or (shm_pure.PureLibrary() if shm_pure.usable() else None)


def this_host() -> Host:
    """Which host this process could share memory on, and by which library; None can be shared without one."""
    library = available_library()
    return Host.nowhere() if library is None else Host.here(type(library).__name__)


class ShmBackend:
    """Collectives of ranks that share a host, and a dead peer noticed within milliseconds by those that wait for it.

    A sum is formed in rank order whichever rank forms it, 16-bit floats in single precision with one rounding, so
    results are bitwise equal on every rank and from run to run. The memory belongs to this generation alone and
    vanishes with its ranks.

    Args:
        store: rendezvous, prefixed so that no other generation uses the same keys.
        timeout: bound of forming the group, and of every wait for a peer.
        hosts: what :func:`exchange_hosts` gave, if the caller asked already.
        prefix: beginning of the memory's name in ``/proc/*/maps``.

    Raises:
        ConfigError: the ranks do not share a host, or the library was not built.
        CollectiveTimeout, PeerLost: a peer did not come.
    """

    name = "shm"

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout: timedelta,
        hosts: Sequence[Host] | None = None,
        prefix: str = "",
    ) -> None:
        library = available_library()
        if library is None:
            raise ConfigError('backend "shm" needs Linux, and this package\'s compiled part or x86-64; use "gloo"')
        if world_size > MAX_RANKS:
            raise ConfigError(f'backend "shm" takes at most {MAX_RANKS} ranks, got {world_size}')
        hosts = hosts or exchange_hosts(store, this_host(), rank, world_size, timeout)
        apart = [peer for peer, host in enumerate(hosts) if host.identity != hosts[rank].identity]
        if apart:
            raise ConfigError(f'backend "shm" needs all ranks on one host; rank {rank} shares none with ranks {apart}')
        self.rank = rank
        self.world_size = world_size
        self._library: Any = library
        self._busy = threading.Lock()  # held while a collective runs
        self._life = threading.Lock()  # held while the region is aborted or unmapped
        cores = {core for host in hosts for core in host.cores}
        spins = _SPINS_ALONE if len(cores) >= world_size else _SPINS_CROWDED
        shared = share(store, library.tp_region_bytes(world_size, SLOT_BYTES), rank, world_size, timeout, prefix)
        watched = (ctypes.c_int * world_size)(*shared.watched)
        seconds = timeout.total_seconds()
        self._region = library.tp_open(shared.memory, rank, world_size, SLOT_BYTES, watched, seconds, spins)
        self._shared = shared
        if not self._region:
            shared.close()
            raise MemoryError(f"cannot map the shared memory of rank {rank}: {os.strerror(ctypes.get_errno())}")

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        carrier = tensor if tensor.dtype in DTYPE_CODES else reducible(tensor)
        code = DTYPE_CODES[carrier.dtype]
        with self._busy:
            region = self._region or self._open()
            if status := self._library.tp_all_reduce(region, carrier.data_ptr(), carrier.nbytes, code, ONCE_BELOW):
                self._check(status, "all-reduce")
        if carrier is not tensor:
            restore(tensor, carrier)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        result = tensor.new_empty((*tensor.shape[:dim], sum(sizes), *tensor.shape[dim + 1 :]))
        rows, widths = _rows(tensor, sizes, dim)
        with self._busy:
            status = self._library.tp_all_gather(self._open(), tensor.data_ptr(), result.data_ptr(), rows, widths)
            self._check(status, "all-gather")
        return result

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        carrier = _summable(tensor)
        rows, widths = _rows(carrier, sizes, dim)
        result = carrier.new_empty((*tensor.shape[:dim], sizes[self.rank], *carrier.shape[dim + 1 :]))
        code = DTYPE_CODES[carrier.dtype]
        with self._busy:
            status = self._library.tp_reduce_scatter(
                self._open(), carrier.data_ptr(), result.data_ptr(), rows, widths, code
            )
            self._check(status, "reduce-scatter")
        return as_dtype(result, tensor.dtype)

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        with self._busy:
            status = self._library.tp_broadcast(self._open(), tensor.data_ptr(), tensor.nbytes, src)
            self._check(status, "broadcast")
        return tensor

    def barrier(self) -> None:
        with self._busy:
            self._check(self._library.tp_barrier(self._open()), "barrier")

    def abort(self, reason: str) -> None:
        with self._life:
            if self._region is not None:
                self._library.tp_abort(self._region, reason.encode("utf-8", "replace")[:500])

    def check(self) -> None:
        with self._life:
            self._check(self._library.tp_failure(self._open()), "check")

    def close(self) -> None:
        """Release everything. A collective that still runs, in another thread, is aborted first."""
        if not self._busy.acquire(blocking=False):
            self.abort("the backend was closed")
            self._busy.acquire()
        try:
            with self._life:
                if self._region is not None:
                    self._library.tp_close(self._region)
                    self._shared.close()
                    self._region = None
        finally:
            self._busy.release()

    def __del__(self) -> None:
        if getattr(self, "_region", None) is not None:
            self.close()

    def _open(self) -> Any:
        if self._region is None:
            raise CollectiveAborted(f"rank {self.rank} of {self.world_size} over shm: the backend is closed")
        return self._region

    def _check(self, status: int, operation: str) -> None:
        if status == 0:
            return
        kind, peer = status & 0xFF, status >> 8
        where = f"{operation} on rank {self.rank} of {self.world_size} over shm"
        if kind == _ABORTED:
            reason = self._library.tp_reason(self._region).decode("utf-8", "replace")
            raise CollectiveAborted(f"{where}: aborted by rank {peer}: {reason}")
        if kind == _TIMED_OUT:
            raise CollectiveTimeout(f"{where}: rank {peer} did not take part in time")
        if kind == _PEER_LOST:
            raise PeerLost(f"{where}: rank {peer} is gone")
        if kind == _MISMATCH:
            raise CollectiveMismatch(f"{where}: rank {peer} is in another collective, or has another shape or dtype")
        raise CollectiveError(f"{where}: unexpected status {status}")


def _summable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in DTYPE_CODES else reducible(tensor)


def _rows(tensor: Tensor, sizes: Sequence[int], dim: int) -> tuple[int, ctypes.Array[ctypes.c_uint64]]:
    """How many rows ``tensor`` has before ``dim``, and how many bytes of one are each rank's."""
    if not tensor.is_contiguous() or not tensor.is_cpu:
        raise ShapeError(f"shm moves contiguous CPU tensors, got {tuple(tensor.shape)} on {tensor.device}")
    inner = prod(tensor.shape[dim + 1 :]) * tensor.element_size()
    return prod(tensor.shape[:dim]), (ctypes.c_uint64 * len(sizes))(*(size * inner for size in sizes))
