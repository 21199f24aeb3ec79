"""One NVIDIA GPU per rank, and a way to leave a collective whose peer is gone without losing the process.

A collective returns once it is queued: the host learns of a lost peer only by waiting for the device, and then not by
an error but by never returning. So failure is found elsewhere (heartbeats), and :meth:`NcclBackend.abort`, from another
thread, ends the kernels that hang. What they computed is rubbish: after synchronising with the device, and before using
a result, call :meth:`NcclBackend.check`.

Drop CUDA graphs that captured collectives before aborting, and capture them again with the next generation. The process
must have started with :data:`tensor_parallel.nccl_environment.NCCL_ENVIRONMENT`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import Store

from tensor_parallel.backends.layout import raw_bytes, reducible, row_bytes
from tensor_parallel.backends.rendezvous import is_timeout
from tensor_parallel.backends.torch_group import TorchGroupBackend
from tensor_parallel.errors import AbortStuck, CollectiveTimeout, ConfigError, PeerLost
from tensor_parallel.nccl_environment import NCCL_ENVIRONMENT

ABORT_SECONDS = 10.0


class NcclBackend(TorchGroupBackend):
    """NCCL collectives on ``device``, connected to all peers when the constructor returns.

    Raises:
        ConfigError: no CUDA device, a torch without NCCL, or a process whose environment would end it at the first
        failure.
        CollectiveTimeout, PeerLost: a peer did not come.
    """

    def __init__(self, store: Store, rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
        make_group = getattr(c10d, "ProcessGroupNCCL", None)
        if device.type != "cuda" or make_group is None:
            raise ConfigError(f"backend 'nccl' needs a CUDA device and a torch built with NCCL, got {device}")
        _check_environment()
        self.device = device
        options = make_group.Options()
        options._timeout = timeout
        options.config.blocking = 0
        torch.cuda.set_device(device)
        try:
            process_group = make_group(store, rank, world_size, options)
            process_group.eager_connect_single_device(device)
        except RuntimeError as error:
            detail = str(error).partition("\n")[0]
            kind = CollectiveTimeout if is_timeout(detail) else PeerLost
            raise kind(f"rank {rank} of {world_size} could not form an NCCL group on {device}: {detail}") from error
        super().__init__(process_group, rank, world_size, "nccl")

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        even_rows = dim == 0 and len(set(sizes)) == 1 and reducible(tensor) is tensor
        if not even_rows:
            return super().reduce_scatter_sum(tensor, sizes, dim)
        result = tensor.new_empty((sizes[self.rank], *tensor.shape[1:]))
        self._wait("reduce-scatter", lambda group: group._reduce_scatter_base(result, tensor))
        return result

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        if dim == 0 and len(set(sizes)) == 1:
            result = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
            if row_bytes(tensor, dim) * sum(sizes):
                self._wait("all-gather", lambda group: group._allgather_base(raw_bytes(result), raw_bytes(tensor)))
            return result
        return super().all_gather(tensor, sizes, dim)

    def barrier(self) -> None:
        """Unlike the others, returns when every rank's device has come this far."""
        self.all_reduce_sum_(torch.zeros(1, device=self.device))
        torch.cuda.synchronize(self.device)
        self.check()

    def close(self) -> None:
        """Shut a healthy group down. A broken one is only let go of: NCCL may neither destroy nor shrink it."""
        group = self._group
        super().close()
        if group is not None and self._aborted is None:
            _within(ABORT_SECONDS, group.shutdown, "shut down")

    def _cut(self) -> None:
        """Bounded. Raises :class:`AbortStuck` when the device does not let go; only ending the process helps then."""
        if self._group is not None:
            _within(ABORT_SECONDS, self._group.abort, "abort")


def device_usable(device: torch.device) -> bool:
    """Whether the CUDA context still computes; asked after an abort, before another generation is joined."""
    try:
        return bool(torch.ones(8, device=device).sum().item() == 8)
    except RuntimeError:
        return False


def _within(seconds: float, action: Any, what: str) -> None:
    failure: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except RuntimeError as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=f"nccl {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise AbortStuck(f"NCCL did not {what} within {seconds:g} s; end this process")
    if failure:
        raise AbortStuck(f"NCCL could not {what}: {failure[0]}; end this process") from failure[0]


def _check_environment() -> None:
    """Values that make torch end the process at the first failure must have been set before torch was imported."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if os.environ.get(name) != NCCL_ENVIRONMENT[name]:
        raise ConfigError(
            f"{name} must be {NCCL_ENVIRONMENT[name]!r} before torch is imported, got {os.environ.get(name)!r}; "
            "start from tensor_parallel.nccl_environment.NCCL_ENVIRONMENT"
        )
