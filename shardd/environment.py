"""The environment that torch, NCCL and gloo must find when they are imported. Imports none of them."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from tensor_parallel.nccl_environment import NCCL_ENVIRONMENT

# Anyone may choose otherwise. C++ messages are no log lines, and what they say reaches us as exceptions.
DEFAULTS = {
    **NCCL_ENVIRONMENT,
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "FATAL",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in this process: no worker processes that outlive a load, or this daemon
}


def prepare(environment: MutableMapping[str, str], *, threads: int, world_size: int, interface: str) -> None:
    """Complete ``environment``; called once, before torch is imported."""
    for name, value in DEFAULTS.items():
        environment.setdefault(name, value)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // world_size)))
    if interface:
        environment["GLOO_SOCKET_IFNAME"] = interface
        environment["NCCL_SOCKET_IFNAME"] = interface


def available_cores() -> int:
    """Cores this process may use: its affinity, and its control group's quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    quota = _control_group("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def host_memory() -> int:
    """Bytes of memory this process may use: the host's, or its control group's limit if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _control_group("memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _control_group(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
