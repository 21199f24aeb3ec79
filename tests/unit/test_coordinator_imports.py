"""The coordinator must start in a fraction of a second, so it must never import torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = ("torch", "transformers", "shardd", "tensor_parallel", "safetensors")


@pytest.mark.parametrize("module", ["coordinator.process", "coordinator.client", "coordinator.cli"])
def test_neither_torch_nor_what_needs_it_is_imported(module):
    code = f"import sys, {module}; print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
