"""Every command and every program in the README is run, and every link in the project's documents leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.cluster import up
from tests.checkpoints import minilm

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "deploy").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGET = "127.0.0.1:50051"
LIVE = ("top", "up")  # verbs that run until they are stopped; `up` runs in the fixture as it stands there


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(README) if name == language]


def console_lines(first_word: str) -> list[str]:
    lines = [line.split("  #")[0].strip() for body in blocks("console") for line in body.splitlines()]
    return [line for line in lines if line.startswith(first_word)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    source, folder = minilm(), root / "all-MiniLM-L6-v2"
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file():
            os.link(file, folder / file.name) if file.stat().st_dev == root.stat().st_dev else (
                folder / file.name
            ).write_bytes(file.read_bytes())
    return root


@pytest.fixture(scope="module")
def target(models):
    (line,) = console_lines("shardctl up")
    words = shlex.split(line.replace("/models", str(models)))
    assert words[:4] == ["shardctl", "up", "--ranks", "2"]
    with up(2, extra=words[6:], model_root=str(models)) as address:
        yield address


def run(command: list[str], target: str, cwd: Path, extra: dict[str, str] | None = None) -> str:
    environment = os.environ | {"SHARDCTL_TARGET": target, "PYTHONPATH": str(ROOT)} | (extra or {})
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(240)
def test_shardctl_commands(target, models, tmp_path):
    lines = [line for line in console_lines("shardctl") if line.split()[1] not in LIVE]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.replace("/models", str(models)))
        run([sys.executable, "-m", "coordinator.cli", *words[1:]], target, tmp_path)
    run([sys.executable, "-m", "coordinator.cli", "load", "minilm", str(models / "all-MiniLM-L6-v2")], target, tmp_path)
    assert (tmp_path / "embedding.npz").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", [b for b in blocks("python") if TARGET in b], ids=lambda b: b.split("\n")[1][:30])
def test_client_programs(program, target, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(program.replace(TARGET, target))
    assert "(1, 4, 384)" in run([sys.executable, str(script)], target, tmp_path)


@pytest.mark.timeout(120)
def test_training_program(tmp_path):
    (program,) = [b for b in blocks("python") if "DistributedModelWrapper" in b]
    script = tmp_path / "train.py"
    script.write_text(program)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE
        )
        for r in range(2)
    ]
    outputs = [rank.communicate(timeout=100)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "'all_reduces': 1" in outputs[0], outputs[0]


def test_make_targets_exist(tmp_path):
    targets = [line.split()[1] for line in console_lines("make")]
    assert set(targets) >= {"demo", "test"}
    mentioned = set(targets) | set(re.findall(r"`make ([a-z-]+)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert {name for name in mentioned if not re.search(rf"^{name}:", makefile, re.MULTILINE)} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    text = document.read_text()
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if link.startswith(("http://", "https://")):
            continue
        there = (document.parent / path) if path else document
        if not there.exists():
            dead.append(link)
        elif anchor and there.suffix == ".md":
            heads = [
                re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-")
                for h in re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            ]
            if anchor not in heads:
                dead.append(link)
    assert dead == []


def test_files_named_in_documents_exist():
    missing = []
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:tests|deploy|tensor_parallel|coordinator|shardd|protos)/[\w./-]*)`", document.read_text()
        ):
            if not (ROOT / name).exists():
                missing.append(f"{document.name}: {name}")
    assert missing == []
