"""Load: how fast a checkpoint reaches the ranks, against one process reading the same bytes with safetensors."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from coordinator.client import Client
from tests.benchmarks.cluster import up
from tests.benchmarks.report import Report


def _checkpoint(folder: Path, layers: int) -> int:
    """A Llama of ``layers`` layers, hidden 2048, random weights; returns its bytes."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _read_all(folder: Path) -> float:
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  a safe_open is no mapping
                file.get_tensor(name).clone()
    return time.perf_counter() - start


def loading(*, layers: int = 8) -> Report:
    report = Report("load", "python -m tests.benchmarks loading")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "llama")
        total = _checkpoint(folder, layers)
        _read_all(folder)
        floor = min(_read_all(folder) for _ in range(3))
        report.add(case="safetensors, one process", seconds=floor, mib_per_second=total / floor / 2**20)
        for ranks in (1, 2, 4):
            with up(ranks, model_root=root) as target, Client(target, timeout=300) as client:
                reading: list[float] = []
                start = time.perf_counter()
                client.load(
                    "llama", str(folder), verify=False, progress=lambda event, r=reading: r.append(time.perf_counter())
                )
                seconds = time.perf_counter() - start
                held = [rank["bytes_held"] for rank in client.health()["ranks"]]
            report.add(
                case=f"this service, {ranks} ranks",
                seconds=seconds,
                mib_per_second=total / seconds / 2**20,
                largest_rank_mib=max(held) / 2**20,
            )
    return report
