"""Where this process stands among its peers: read once from the environment, validated, kept in one frozen value."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from tensor_parallel.backends import form_backend
from tensor_parallel.backends.rendezvous import is_timeout
from tensor_parallel.backends.torch_group import TorchGroupBackend
from tensor_parallel.errors import CollectiveError, CollectiveTimeout, ConfigError, NotInitialized
from tensor_parallel.group import Backend, Group, process_group

_LOG = logging.getLogger("tensor_parallel")
_KINDS = ("nccl", "gloo", "shm", "auto")
_PLACE = ("RANK", "WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class TensorParallelConfig:
    """This process's place: which rank of how many, on which device, reaching the others how.

    ``local_rank`` is the rank among the processes of this host, and the index of its GPU under ``"nccl"``.
    """

    world_size: int
    rank: int
    local_rank: int
    backend: str
    device: torch.device


@dataclass
class _State:
    config: TensorParallelConfig | None = None
    backend: Backend | None = None
    owns_process_group: bool = False


_state = _State()


def read_environment(environment: Mapping[str, str], backend: str) -> TensorParallelConfig:
    """The configuration that ``torchrun``'s variables describe; a lone process without any is rank 0 of 1.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` (default: ``RANK``) and, for more than one rank, ``MASTER_ADDR`` and
    ``MASTER_PORT``. Raises :class:`ConfigError` naming the variable that is missing or malformed.
    """
    if backend not in _KINDS:
        raise ConfigError(f"unknown backend {backend!r}: choose one of {', '.join(_KINDS)}")
    present = [name for name in _PLACE if name in environment]
    if len(present) == 1:
        missing = next(name for name in _PLACE if name not in environment)
        raise ConfigError(f"{present[0]} is set but {missing} is not: set both, or neither for a single process")
    world_size = _integer(environment, "WORLD_SIZE", 1, low=1)
    rank = _integer(environment, "RANK", 0, low=0)
    if rank >= world_size:
        raise ConfigError(f"RANK={rank} must be below WORLD_SIZE={world_size}")
    local_rank = _integer(environment, "LOCAL_RANK", rank, low=0)
    if world_size > 1:
        for name in _ADDRESS:
            if not environment.get(name):
                raise ConfigError(f"{name} must be set when WORLD_SIZE={world_size}: where do the ranks meet?")
        _integer(environment, "MASTER_PORT", 0, low=1, high=65535)
    return TensorParallelConfig(world_size, rank, local_rank, backend, _device(backend, local_rank))


def init_tensor_parallel(backend: str = "nccl", *, timeout: timedelta = timedelta(minutes=5)) -> TensorParallelConfig:
    """Join the group that the environment describes (see :func:`read_environment`), or adopt the one made already.

    A group that the caller made with ``dist.init_process_group`` is used as it is and never destroyed. Otherwise more
    than one rank makes ``torch.distributed``'s default group, so that everything else in torch works beside this
    package; a single process makes none. Calling again with the same backend returns the same configuration.

    Args:
        backend: ``"nccl"`` (one GPU per rank), ``"gloo"`` (CPU), ``"shm"`` (CPU ranks of one host, through shared
            memory) or ``"auto"`` (the best of them for this machine).
        timeout: bound of joining and of each collective.

    Raises:
        ConfigError: the environment or ``backend`` cannot work here; the message says which value.
        CollectiveError: a peer did not come, or left.
    """
    if _state.config is not None:
        if backend not in (_state.config.backend, "auto"):
            raise ConfigError(
                f"already initialised with backend {_state.config.backend!r}; "
                f"call destroy_tensor_parallel() before using {backend!r}"
            )
        return _state.config
    if os.environ.get("TP_DEBUG") == "1":
        _LOG.setLevel(logging.DEBUG)
    if dist.is_available() and dist.is_initialized():
        config = _describe_existing(backend)
    else:
        config = read_environment(os.environ, backend)
        if config.world_size > 1:
            _make_process_group(config, timeout)
    try:
        connection = _connect(config, timeout)
    except BaseException:
        destroy_tensor_parallel()
        raise
    if connection is not None:
        config = replace(config, backend=connection.name if backend == "auto" else backend)
    _state.config, _state.backend = config, connection
    process_group.group = Group(config.rank, config.world_size, connection)
    _LOG.debug("initialised %s", config)
    return config


def get_tensor_parallel_config() -> TensorParallelConfig:
    """The configuration of this process. Raises :class:`NotInitialized` before :func:`init_tensor_parallel`."""
    if _state.config is not None:
        return _state.config
    if dist.is_available() and dist.is_initialized():
        return _describe_existing(dist.get_backend())
    raise NotInitialized("tensor parallelism is not initialised in this process: call init_tensor_parallel() first")


def destroy_tensor_parallel() -> None:
    """Leave the group and forget the configuration; :func:`init_tensor_parallel` may be called again. Idempotent."""
    process_group.group = None
    if _state.backend is not None:
        _state.backend.close()
    if _state.owns_process_group and dist.is_initialized():
        dist.destroy_process_group()
    _state.config, _state.backend, _state.owns_process_group = None, None, False


def _make_process_group(config: TensorParallelConfig, timeout: timedelta) -> None:
    on_gpu = config.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(config.device)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=config.rank,
            world_size=config.world_size,
            timeout=timeout,
            device_id=config.device if on_gpu else None,
        )
    except RuntimeError as error:
        detail = str(error).partition("\n")[0]
        kind = CollectiveTimeout if is_timeout(detail) else CollectiveError
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise kind(
            f"rank {config.rank} of {config.world_size} could not join its group at {meeting}: {detail}"
        ) from error
    _state.owns_process_group = True


def _connect(config: TensorParallelConfig, timeout: timedelta) -> Backend | None:
    """The backend to bind: shared memory beside torch's group where asked for, torch's group itself otherwise."""
    if config.world_size == 1:
        return None
    if config.backend in ("shm", "auto") and config.device.type == "cpu":
        return form_backend(
            config.backend,
            store=PrefixStore("tensor_parallel", _get_default_store()),
            rank=config.rank,
            world_size=config.world_size,
            device=config.device,
            timeout=timeout,
        )
    return TorchGroupBackend.adopt(dist.group.WORLD)


def _describe_existing(backend: str) -> TensorParallelConfig:
    rank = dist.get_rank()
    local_rank = _integer(os.environ, "LOCAL_RANK", rank, low=0)
    if backend in ("nccl", "gloo") and backend not in dist.get_backend():
        raise ConfigError(
            f"backend {backend!r} asked for, but the process group that exists uses {dist.get_backend()!r}"
        )
    return TensorParallelConfig(dist.get_world_size(), rank, local_rank, backend, _device(backend, local_rank))


def _device(backend: str, local_rank: int) -> torch.device:
    if backend in ("gloo", "shm") or (backend == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError('backend "nccl" needs a CUDA device and torch sees none; use backend="gloo" for CPU ranks')
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"LOCAL_RANK={local_rank} has no GPU: torch sees {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank)


def _integer(environment: Mapping[str, str], name: str, default: int, low: int, high: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{name} must be an integer, got {text!r}") from None
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name} must be {bounds}, got {value}")
    return value
