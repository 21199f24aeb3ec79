"""The GPUs of a node, asked of the driver's own library: here one that a test has compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.supervisor.devices import cores, gpus

DRIVER = """
#include <stdint.h>
#include <stdio.h>
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return COUNT; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(uintptr_t)(index + 1); return 0; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size) {
    int index = (int)(uintptr_t)device - 1;
    snprintf(uuid, size, "GPU-%d", index);
    return index == BAD ? 999 : 0;
}
"""
FOUND = "import json; from coordinator.supervisor.devices import gpus; print(json.dumps(gpus()))"


def driver(directory: Path, init: int = 0, count: int = 0, bad: int = -1) -> Path:
    """Compiles one with three GPUs; the numbers are what its calls return, and whose GPU is beyond repair."""
    (directory / "nvml.c").write_text(DRIVER)
    given = [f"-DINIT={init}", f"-DCOUNT={count}", f"-DBAD={bad}"]
    library = str(directory / "libnvidia-ml.so.1")
    compiled = ["cc", "-shared", "-fPIC", "-w", *given, "-o", library, str(directory / "nvml.c")]
    subprocess.run(compiled, check=True, timeout=60)
    return directory


def found(libraries: Path, **variables: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment |= variables | {"LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, "-c", FOUND]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(shown.stdout)


def test_every_gpu_of_the_driver_in_order(tmp_path):
    assert found(driver(tmp_path)) == ["GPU-0", "GPU-1", "GPU-2"]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [("2,0", ["GPU-2", "GPU-0"]), ("1,7,0", ["GPU-1"]), ("", []), ("GPU-9, MIG-4,x,0", ["GPU-9", "MIG-4"])],
)
def test_those_that_the_environment_leaves_visible(tmp_path, visible, chosen):
    assert found(driver(tmp_path), CUDA_VISIBLE_DEVICES=visible) == chosen


def test_a_gpu_that_has_fallen_off_the_bus_is_left_out(tmp_path):
    assert found(driver(tmp_path, bad=1)) == ["GPU-0", "GPU-2"]


@pytest.mark.parametrize("fault", [{"init": 9}, {"count": 9}], ids=str)
def test_a_driver_that_does_not_answer_has_none(tmp_path, fault):
    assert found(driver(tmp_path, **fault)) == []


def test_what_is_there_without_a_driver():
    if not Path("/proc/driver/nvidia").exists():
        assert gpus({"CUDA_VISIBLE_DEVICES": "0"}) == []
    assert 1 <= cores() <= (os.cpu_count() or 1)
