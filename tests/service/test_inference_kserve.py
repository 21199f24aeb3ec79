"""KServe's Python client against the service; it needs `pip install kserve`, here or where KSERVE_PYTHON points."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.fake_core import FakeServer

SCRIPT = Path(__file__).with_name("kserve_checks.py")
PYTHON = os.environ.get("KSERVE_PYTHON") or (sys.executable if importlib.util.find_spec("kserve") else None)


@pytest.mark.skipif(PYTHON is None, reason="kserve is not installed; KSERVE_PYTHON can name a Python that has it")
def test_kserve_client():
    with FakeServer() as server:
        done = subprocess.run([PYTHON, str(SCRIPT), server.target], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check passed" in done.stdout
