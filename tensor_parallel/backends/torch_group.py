"""A :class:`~tensor_parallel.group.Backend` over any ``torch.distributed`` process-group object."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from tensor_parallel.backends.layout import (
    as_dtype,
    join_gathered,
    raw_bytes,
    reducible,
    restore,
    row_bytes,
    split_for_ranks,
)
from tensor_parallel.backends.rendezvous import is_timeout
from tensor_parallel.errors import CollectiveAborted, CollectiveError, CollectiveTimeout, PeerLost


class TorchGroupBackend:
    """Collectives over a process group made elsewhere.

    Args:
        process_group: anything with the methods of ``ProcessGroup`` or of one of its backends
            (``ProcessGroupGloo``...).
        rank, world_size: this rank's place in it.
        name: what to call it in messages.
    """

    def __init__(self, process_group: Any, rank: int, world_size: int, name: str) -> None:
        self.name = name
        self.rank = rank
        self.world_size = world_size
        self._group = process_group
        self._lock = threading.Lock()
        self._aborted: str | None = None

    @classmethod
    def adopt(cls, process_group: Any) -> TorchGroupBackend:
        """Over a group of ``torch.distributed``'s own, such as ``dist.group.WORLD``."""
        return cls(
            process_group,
            dist.get_rank(process_group),
            dist.get_world_size(process_group),
            dist.get_backend(process_group),
        )

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        carrier = reducible(tensor)
        self._wait("all-reduce", lambda group: group.allreduce([carrier]))
        restore(tensor, carrier)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        send = raw_bytes(tensor)
        lengths = [size * row_bytes(tensor, dim) for size in sizes]
        flat = send.new_empty(sum(lengths))
        if max(sizes) == min(sizes):
            self._wait("all-gather", lambda group: group._allgather_base(flat, send))
        else:
            # all_gather wants equal lengths, all_to_all does not: every rank sends the same bytes to all.
            repeated = send.expand(self.world_size, -1).reshape(-1)
            self._wait(
                "all-gather",
                lambda group: group.alltoall_base(flat, repeated, lengths, [send.numel()] * self.world_size),
            )
        return join_gathered(flat, tensor, sizes, dim)

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """As an all-to-all and a local sum in rank order: the bytes of a ring, any sizes, and one rounding order."""
        send = split_for_ranks(tensor, sizes, dim)
        shape = [*tensor.shape[:dim], sizes[self.rank], *tensor.shape[dim + 1 :]]
        lengths = [size * row_bytes(tensor, dim) for size in sizes]
        flat = send.new_empty((self.world_size, *shape))
        receive = [lengths[self.rank]] * self.world_size
        self._wait(
            "reduce-scatter", lambda group: group.alltoall_base(raw_bytes(flat), raw_bytes(send), receive, lengths)
        )
        carrier = reducible(flat)
        return as_dtype(torch.sum(carrier, 0, dtype=carrier.dtype), tensor.dtype)

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        self._wait("broadcast", lambda group: group.broadcast([raw_bytes(tensor)], options))
        return tensor

    def barrier(self) -> None:
        self._wait("barrier", lambda group: group.barrier())

    def abort(self, reason: str) -> None:
        with self._lock:
            if self._aborted is None:
                self._aborted = reason
                self._cut()

    def check(self) -> None:
        if self._aborted is not None:
            raise CollectiveAborted(self._describe("check", self._aborted))

    def close(self) -> None:
        self._group = None

    def _cut(self) -> None:
        """Make a blocked collective return. A group that somebody else made is somebody else's to tear down."""

    def _wait(self, operation: str, start: Callable[[Any], Any]) -> None:
        try:
            self._start(operation, start).wait()
        except CollectiveAborted:
            raise
        except RuntimeError as error:
            self._raise(operation, error)

    def _start(self, operation: str, start: Callable[[Any], Any]) -> Any:
        group = self._group
        if self._aborted is not None or group is None:
            raise CollectiveAborted(self._describe(operation, self._aborted or "the backend is closed"))
        return start(group)

    def _raise(self, operation: str, error: RuntimeError) -> NoReturn:
        """Say which of three things happened, and let go of the peers: none may wait for a rank that has given up."""
        if self._aborted is not None:
            raise CollectiveAborted(self._describe(operation, self._aborted)) from error
        detail = str(error).partition("\n")[0] or type(error).__name__
        kind: type[CollectiveError] = CollectiveTimeout if is_timeout(detail) else PeerLost
        self.abort(f"an earlier {operation} failed: {detail}")
        raise kind(self._describe(operation, detail)) from error

    def _describe(self, operation: str, detail: str) -> str:
        return f"{operation} on rank {self.rank} of {self.world_size} over {self.name}: {detail}"
