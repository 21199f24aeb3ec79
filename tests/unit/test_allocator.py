"""The coordinator keeps large buffers for the next message, and runs on uvloop where it can be had."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from coordinator import main

PAGES = (16 << 20) // 4096
PROGRAM = """
import resource, sys
from protos.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = [bytearray(16 << 20), bytearray(16 << 20)]
held.clear()
before = faults()
for _ in range(10):
    held = [bytearray(16 << 20), bytearray(16 << 20)]
    held.clear()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's allocator")
def test_freed_buffers_are_used_again_without_new_pages():
    faults = {
        how: int(
            subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, check=True, timeout=30).stdout
        )
        for how in ("keep", "leave")
    }
    assert faults["keep"] < PAGES < faults["leave"]


def test_the_loop_is_uvloops_if_it_is_installed():
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed (there is none for Windows)")
    assert main._loop_factory() is uvloop.new_event_loop


def test_the_loop_is_asyncios_otherwise(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert main._loop_factory() is None
