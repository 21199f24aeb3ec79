"""The handle that layers, wrapped modules and graphs hold instead of a process group.

Weights outlive process groups: when a peer dies, every survivor's group is finished but its weights are not. So
whatever holds weights holds a :class:`Group`, and whoever manages failures binds it to the :class:`Backend` of the
current generation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

import tensor_parallel.vector_math  # noqa: F401 - before anything computes: all that does comes by this module
from tensor_parallel.errors import ConfigError, GroupUnbound
from tensor_parallel.partition import check_rank


@runtime_checkable
class Backend(Protocol):
    """One rank's connection to its peers for one generation.

    Every rank calls the same operations in the same order with matching shapes and dtypes. Results are bitwise equal on
    every rank. Tensors are contiguous. A failure raises a :class:`~tensor_parallel.errors.CollectiveError` and finishes
    the backend.
    """

    name: str
    rank: int
    world_size: int

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by the sum over ranks, in place, and return it."""
        ...

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Concatenate every rank's ``tensor`` along ``dim``; rank ``r``'s has ``sizes[r]`` elements there."""
        ...

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Sum ``tensor`` over ranks and return this rank's ``sizes[rank]`` elements along ``dim``."""
        ...

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        """Replace ``tensor`` by rank ``src``'s, in place, and return it."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called it."""
        ...

    def abort(self, reason: str) -> None:
        """End the generation, from any thread: a blocked or later collective raises ``CollectiveAborted`` promptly."""
        ...

    def check(self) -> None:
        """Raise ``CollectiveAborted`` if the generation has been ended.

        Where collectives return before they have run (CUDA), call it after synchronising and before using a result.
        """
        ...

    def close(self) -> None:
        """Release sockets, threads and memory. Idempotent; nothing may be called afterwards."""
        ...


@dataclass
class CollectiveStats:
    """What a group has executed: how many of each collective, their payload bytes, and the seconds inside them."""

    all_reduces: int = 0
    all_gathers: int = 0
    reduce_scatters: int = 0
    broadcasts: int = 0
    barriers: int = 0
    size_exchanges: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def begun(self) -> int:
        """All of them, those that run and those that failed included."""
        reducing = self.all_reduces + self.reduce_scatters
        return reducing + self.all_gathers + self.broadcasts + self.barriers + self.size_exchanges

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, field.default)

    def snapshot(self) -> dict[str, int | float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Group:
    """This rank's place among its peers: a rank, a world size, and the backend of the moment.

    A group of one rank needs no backend and communicates nothing. Copies of a module share its group; pickling keeps
    the place and drops the backend.

    Args:
        rank: this rank, in ``[0, world_size)``.
        world_size: number of ranks.
        backend: connection to bind at once, if there is one already.
    """

    def __init__(self, rank: int, world_size: int, backend: Backend | None = None) -> None:
        check_rank(rank, world_size)
        self.rank = rank
        self.world_size = world_size
        self.stats = CollectiveStats()
        self._backend: Backend | None = None
        if backend is not None:
            self.bind(backend)

    def bind(self, backend: Backend) -> None:
        """Use ``backend`` from now on. Raises :class:`ConfigError` when it belongs to another rank or world size."""
        if (backend.rank, backend.world_size) != (self.rank, self.world_size):
            raise ConfigError(
                f"cannot bind a {backend.name} backend of rank {backend.rank} of {backend.world_size} "
                f"to the group of rank {self.rank} of {self.world_size}"
            )
        self._backend = backend

    def unbind(self) -> None:
        """Forget the backend, without closing it: collectives raise :class:`GroupUnbound` until :meth:`bind`."""
        self._backend = None

    @property
    def bound(self) -> bool:
        """Whether a collective can be called now."""
        return self._backend is not None or self.world_size == 1

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise GroupUnbound(
                f"rank {self.rank} of {self.world_size} has no process group: not formed yet, or lost to a failure"
            )
        return self._backend

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace contiguous ``tensor`` by the sum over ranks."""
        if self.world_size == 1:
            return tensor
        # As ``_timed``, by a shorter way: a small model's time is that of its all-reduces.
        backend, stats = self._backend or self.backend, self.stats
        stats.all_reduces += 1
        stats.bytes += tensor.nbytes
        start = perf_counter()
        backend.all_reduce_sum_(tensor)
        stats.seconds += perf_counter() - start
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Concatenate the ranks' contiguous ``tensor``s along ``dim``, where rank ``r`` holds ``sizes[r]`` elements."""
        if self.world_size == 1:
            return tensor
        self.stats.all_gathers += 1
        return self._timed(tensor, self.backend.all_gather, sizes, dim)

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Sum contiguous ``tensor`` over ranks and return this rank's ``sizes[rank]`` elements along ``dim``."""
        if self.world_size == 1:
            return tensor
        self.stats.reduce_scatters += 1
        return self._timed(tensor, self.backend.reduce_scatter_sum, sizes, dim)

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        """Replace contiguous ``tensor`` by rank ``src``'s."""
        if not 0 <= src < self.world_size:
            raise ConfigError(f"source rank must be in [0, {self.world_size}), got {src}")
        if self.world_size == 1:
            return tensor
        self.stats.broadcasts += 1
        return self._timed(tensor, self.backend.broadcast_, src)

    def barrier(self) -> None:
        """Return once every rank has called it."""
        if self.world_size == 1:
            return
        self.stats.barriers += 1
        start = perf_counter()
        self.backend.barrier()
        self.stats.seconds += perf_counter() - start

    def exchange_sizes(self, size: int, device: torch.device) -> tuple[int, ...]:
        """Every rank's ``size``, in rank order; one tiny collective on ``device``."""
        if self.world_size == 1:
            return (size,)
        self.stats.size_exchanges += 1
        gathered = self.backend.all_gather(torch.tensor([size], device=device), [1] * self.world_size, 0)
        return tuple(int(value) for value in gathered.tolist())

    def _timed(self, tensor: Tensor, operation: Callable[..., Tensor], *args: object) -> Tensor:
        self.stats.bytes += tensor.nbytes
        start = perf_counter()
        result = operation(tensor, *args)
        self.stats.seconds += perf_counter() - start
        return result

    def __deepcopy__(self, memo: dict[int, object]) -> Group:
        return self

    def __reduce__(self) -> tuple[type[Group], tuple[int, int]]:
        return Group, (self.rank, self.world_size)

    def __repr__(self) -> str:
        backend = self._backend.name if self._backend is not None else "unbound"
        return f"Group(rank={self.rank}, world_size={self.world_size}, {backend})"


class _ProcessGroup:
    """The group that ``group=None`` means in this process; ``init_tensor_parallel`` sets it."""

    def __init__(self) -> None:
        self.group: Group | None = None
        self._adopted: tuple[object, Group] | None = None

    def current(self) -> Group:
        if self.group is not None:
            return self.group
        if dist.is_available() and dist.is_initialized():
            return self._adopt()
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched != "1":
            raise GroupUnbound(f"WORLD_SIZE={launched}, but no process group exists: call init_tensor_parallel() first")
        return Group(0, 1)

    def _adopt(self) -> Group:
        """The group the user made with ``dist.init_process_group``; the same handle for as long as that group lives."""
        from tensor_parallel.backends.torch_group import TorchGroupBackend

        process_group = dist.group.WORLD
        if self._adopted is None or self._adopted[0] is not process_group:
            backend = TorchGroupBackend.adopt(process_group)
            self._adopted = (process_group, Group(backend.rank, backend.world_size, backend))
        return self._adopted[1]


process_group = _ProcessGroup()


def default_group() -> Group:
    """What ``group=None`` means: the group of :func:`init_tensor_parallel`, else the one the user made with
    ``dist.init_process_group``, else a world of one.

    Raises :class:`GroupUnbound` when the environment says that this process was launched as one of several and neither
    exists.
    """
    return process_group.current()
