"""Form the group of one generation."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Store

from tensor_parallel.backends.gloo import GlooBackend
from tensor_parallel.backends.nccl import NcclBackend
from tensor_parallel.backends.shm import ShmBackend, this_host
from tensor_parallel.backends.shm_handshake import Host, exchange_hosts
from tensor_parallel.backends.shm_library import MAX_RANKS, load_library
from tensor_parallel.backends.staged import StagedBackend
from tensor_parallel.errors import ConfigError, PeerLost
from tensor_parallel.group import Backend
from tensor_parallel.partition import check_rank

KINDS = ("auto", "gloo", "nccl", "shm")


def form_backend(
    kind: str,
    *,
    store: Store,
    rank: int,
    world_size: int,
    device: torch.device | str = "cpu",
    timeout: timedelta = timedelta(seconds=30),
    segment_prefix: str = "",
    host: str = "",
    connected: Callable[[Backend], None] | None = None,
) -> Backend:
    """Connect this rank to its peers and prove it with one checked all-reduce. Every rank calls it with the same
    arguments.

    Args:
        kind: one of :data:`KINDS`; see :mod:`tensor_parallel.backends`.
        store: rendezvous for this generation alone (wrap a long-lived one in ``PrefixStore``).
        device: where the tensors of the collectives live.
        timeout: bound of forming and of each later collective.
        segment_prefix: prefix of the name of a shared-memory segment.
        host: address gloo binds, where the host's own name does not resolve to a usable one.
        connected: given the backend before its first all-reduce, so that another thread can abort one that hangs.

    Raises:
        ConfigError: unknown kind, or one that cannot work on this device.
        CollectiveError: a peer did not come, left, or sums wrongly.
    """
    check_rank(rank, world_size)
    device = torch.device(device)
    if kind not in KINDS:
        raise ConfigError(f"unknown backend {kind!r}: choose one of {', '.join(KINDS)}")
    backend = _connect(kind, store, rank, world_size, device, timeout, segment_prefix, host)
    try:
        if connected is not None:
            connected(backend)
        _check(backend, device)
    except BaseException:
        backend.close()
        raise
    return backend


def _connect(
    kind: str,
    store: Store,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout: timedelta,
    segment_prefix: str,
    host: str,
) -> Backend:
    if kind == "nccl" or (kind == "auto" and device.type == "cuda"):
        return NcclBackend(store, rank, world_size, device, timeout)
    if device.type == "cuda":
        return StagedBackend(
            _connect(kind, store, rank, world_size, torch.device("cpu"), timeout, segment_prefix, host)
        )
    if device.type != "cpu":
        raise ConfigError(f"backend {kind!r} moves CPU tensors, not those of {device}")
    if kind == "shm":
        return ShmBackend(store, rank, world_size, timeout, prefix=segment_prefix)
    if kind == "auto":
        here = this_host() if load_library() is not None else Host.nowhere()
        hosts = exchange_hosts(store, here, rank, world_size, timeout)
        if len({one.identity for one in hosts}) == 1 and world_size <= MAX_RANKS:
            return ShmBackend(store, rank, world_size, timeout, hosts, segment_prefix)
    return GlooBackend(store, rank, world_size, timeout, host)


def _check(backend: Backend, device: torch.device) -> None:
    """One all-reduce with a known answer: a half-formed or mixed-up group must fail here, not in a request."""
    probe = torch.tensor([1.0, float(backend.rank)], device=device)
    total = backend.all_reduce_sum_(probe).tolist()
    ranks = backend.world_size
    if total != [ranks, ranks * (ranks - 1) / 2]:
        backend.abort("the first all-reduce was wrong")
        raise PeerLost(f"rank {backend.rank} of {ranks} over {backend.name}: the first all-reduce gave {total}")
