"""One NVIDIA GPU per rank, and a way to leave a collective whose peer is gone without losing the process.

A collective returns once it is queued: the host learns of a lost peer only by waiting for the device, and then not by
an error but by never returning. So failure is found elsewhere (heartbeats), and :meth:`NcclBackend.abort`, from another
thread, ends the kernels that hang. What they computed is rubbish: after synchronising with the device, and before using
a result, call :meth:`NcclBackend.check`.

Communicators are blocking ones. Non-blocking ones promise that forming can be aborted, but torch holds a communicator's
lock while it waits for one to be ready, so that an abort waits too; NCCL starts a thread for each of their collectives;
and torch itself has stopped using them where they hung (pytorch/pytorch#153960). Instead forming runs on a thread of
its own, once all ranks are known to have come, and whoever waits for it stops waiting in time.

Drop CUDA graphs that captured collectives before aborting, and capture them again with the next generation. The process
must have started with :data:`tensor_parallel.nccl_environment.NCCL_ENVIRONMENT`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import Store

from tensor_parallel.backends.layout import raw_bytes, reducible, row_bytes
from tensor_parallel.backends.rendezvous import is_timeout, wait_for_keys
from tensor_parallel.backends.torch_group import TorchGroupBackend
from tensor_parallel.errors import AbortStuck, CollectiveTimeout, ConfigError, PeerLost
from tensor_parallel.nccl_environment import NCCL_ENVIRONMENT

ABORT_SECONDS = 10.0
QUEUE_SECONDS = 1.0
"""How long an abort waits for a collective that is being queued; one that takes longer is itself stuck."""


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
        self._queueing = threading.Lock()
        options = make_group.Options()
        options._timeout = timeout
        options.config.blocking = 1
        deadline = time.monotonic() + timeout.total_seconds()
        store.set(f"arrived/{rank}", "1")
        # NCCL waits for ever for a rank that does not come; none of its threads should.
        wait_for_keys(store, [f"arrived/{peer}" for peer in range(world_size)], timeout)
        torch.cuda.set_device(device)

        def form() -> Any:
            torch.cuda.set_device(device)  # of this thread
            group = make_group(store, rank, world_size, options)
            group.eager_connect_single_device(device)
            return group

        forming = _Aside(form, "form")
        failed = f"rank {rank} of {world_size} could not form an NCCL group on {device}"
        try:
            process_group = forming.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise CollectiveTimeout(f"{failed}: a peer did not answer within {timeout}") from None
        except RuntimeError as error:
            detail = str(error).partition("\n")[0]
            kind = CollectiveTimeout if is_timeout(detail) else PeerLost
            raise kind(f"{failed}: {detail}") from error
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

    def _start(self, operation: str, start: Callable[[Any], Any]) -> Any:
        with self._queueing:  # NCCL frees what an abort ends, whoever is inside
            return super()._start(operation, start)

    def _cut(self) -> None:
        """Bounded. Raises :class:`AbortStuck` when the device does not let go; only ending the process helps then."""
        group = self._group
        if group is None:
            return
        alone = self._queueing.acquire(timeout=QUEUE_SECONDS)
        try:
            _within(ABORT_SECONDS, group.abort, "abort")
        finally:
            if alone:
                self._queueing.release()


def device_usable(device: torch.device) -> bool:
    """Whether the CUDA context still computes; asked after an abort, before another generation is joined."""
    try:
        return bool(torch.ones(8, device=device).sum().item() == 8)
    except RuntimeError:
        return False


class _Aside:
    """A call on a thread of its own, which whoever waits for it can leave behind."""

    def __init__(self, action: Callable[[], Any], what: str) -> None:
        self._action = action
        self._done = threading.Event()
        self._result: Any = None
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, name=f"nccl {what}", daemon=True).start()

    def result(self, seconds: float) -> Any:
        """What it returned, or raises what it raised; TimeoutError if it has done neither after ``seconds``."""
        if not self._done.wait(seconds):
            raise TimeoutError
        if self._failure is not None:
            raise self._failure
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._action()
        except BaseException as error:
            self._failure = error
        self._action = lambda: None  # it may hold a group
        self._done.set()


def _within(seconds: float, action: Callable[[], Any], what: str) -> None:
    try:
        _Aside(action, what).result(seconds)
    except TimeoutError:
        raise AbortStuck(f"NCCL did not {what} within {seconds:g} s; end this process") from None
    except RuntimeError as error:
        raise AbortStuck(f"NCCL could not {what}: {error}; end this process") from error


def _check_environment() -> None:
    """Values that make torch end the process at the first failure must have been set before torch was imported."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if os.environ.get(name) != NCCL_ENVIRONMENT[name]:
        raise ConfigError(
            f"{name} must be {NCCL_ENVIRONMENT[name]!r} before torch is imported, got {os.environ.get(name)!r}; "
            "start from tensor_parallel.nccl_environment.NCCL_ENVIRONMENT"
        )
