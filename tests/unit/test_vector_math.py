"""MKL has chosen its vector functions' kernels before a second thread can compute."""

from __future__ import annotations

import subprocess
import sys

import pytest

# MKL's own variable for the choice: what its function, which is exported, reads first (``mov choice(%rip), %eax``).
PROGRAM = """
import ctypes, importlib, sys
from pathlib import Path
import torch

try:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    function = ctypes.cast(library.mkl_vml_serv_cpu_detect, ctypes.c_void_p).value
except (OSError, AttributeError):
    sys.exit("unknown: no MKL")
if ctypes.string_at(function, 2) != b"\\x8b\\x05":
    sys.exit("unknown: another MKL")
choice = ctypes.c_int.from_address(function + 6 + ctypes.c_int.from_address(function + 2).value)
x = torch.linspace(0.05, 0.95, 48)
found = [choice.value]
importlib.import_module(sys.argv[1])
found.append(choice.value)
torch.tanh(x)
found.append(choice.value)
print(*found)
"""


@pytest.mark.parametrize("module", ["tensor_parallel.layers", "tensor_parallel.checkpoint", "shardd.core"])
def test_what_computes_has_the_kernels_chosen_when_imported(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, module], capture_output=True, text=True, timeout=50)
    if done.stderr.startswith("unknown"):
        pytest.skip(f"where the choice is kept is {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    before, imported, used = map(int, done.stdout.split())
    assert before == -1, "torch has chosen by itself: tensor_parallel/vector_math.py is not needed any more"
    assert imported == used >= 0
