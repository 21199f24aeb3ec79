"""`shardctl plan`: from a model's description alone, with no server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from coordinator.cli.app import shardctl
from tests.service.cluster import ROOT

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 256,
    "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def run(*arguments, code=0):
    result = CliRunner().invoke(shardctl, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output + result.stderr
    return result


def test_config_alone_is_enough(model):
    found = json.loads(run(model, "--ranks", 2, "--device-memory", "1MiB", "--json").stdout)
    assert found["fits"] is True
    assert found["mode"] == "graph"
    assert found["ranks"] == len(found["bytes_per_rank"]) == 2
    # Every matrix is split; the norms are not. bfloat16: two bytes each.
    embeddings, attention, mlp, norms = 2 * 256 * 64, 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128, 64
    assert found["total_bytes"] >= 2 * (embeddings + 2 * (attention + mlp + 2 * norms) + norms)
    assert max(found["bytes_per_rank"]) < 0.6 * found["total_bytes"]
    assert found["collectives"]["all_reduces"] >= 4  # two a layer, as Megatron-LM has


def test_what_does_not_fit_is_exit_code_1(model):
    result = run(model, "--ranks", 2, "--device-memory", "10KiB", code=1)
    assert "does not fit in 10.0 KiB" in result.stdout


@pytest.mark.parametrize("arguments", [["--ranks", 0], [], ["--ranks", 2, "--device-memory", "big"]], ids=str)
def test_wrong_usage(model, arguments):
    run(model, *arguments, code=2)


def test_what_is_no_model_says_so(tmp_path):
    result = run(tmp_path, "--ranks", 2, code=1)
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_torch_it_says_what_to_install(model):
    program = "import sys; sys.modules['torch'] = None; from coordinator.cli import main; main()"
    command = [sys.executable, "-c", program, "plan", str(model), "--ranks", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert "plan needs torch" in result.stderr
    assert "pip install" in result.stderr
