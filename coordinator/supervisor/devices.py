"""What this machine has to run ranks on: CPU cores, and GPUs as the driver tells (without torch)."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use: its affinity, and its control group's quota where there is one."""
    available = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        available = min(available, math.ceil(int(quota) / int(period)))
    return max(1, available)


def gpus(environment: Mapping[str, str] | None = None) -> list[str]:
    """The GPUs that may be used, each as a value for ``CUDA_VISIBLE_DEVICES``: UUIDs, or what that variable lists."""
    found = _driver_uuids()
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return found
    # As CUDA reads it: up to the first entry that names no device.
    chosen: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit() and int(entry) < len(found):
            chosen.append(found[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")):
            chosen.append(entry)
        else:
            break
    return chosen


def _driver_uuids() -> list[str]:
    """In PCI bus order, from NVML; empty without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        uuids = []
        for index in range(count.value):
            device, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(96)
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
                continue
            if nvml.nvmlDeviceGetUUID(device, uuid, len(uuid)) == 0:
                uuids.append(uuid.value.decode())
        return uuids
    finally:
        nvml.nvmlShutdown()
