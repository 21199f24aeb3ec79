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
    """``seconds`` is a Load as its caller sees it, planning included; ``reading`` the part in which weights are read.

    ``held_over_file``: bytes that all ranks hold over the file's; a rank reads what it holds and no more, so 1 means
    that the file was read once, not once by each rank.
    """
    report = Report("load", "python -m tests.benchmarks loading")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "llama")
        total = _checkpoint(folder, layers)
        _read_all(folder)
        floor = min(_read_all(folder) for _ in range(3))
        rate = total / floor / 2**20
        report.add(case="safetensors, one process", seconds=floor, reading_seconds=floor, mib_per_second=rate)
        for ranks in (1, 2, 4):
            stages: list[tuple[float, str]] = []
            with up(ranks, model_root=root) as target, Client(target, timeout=300) as client:
                stages.append((time.perf_counter(), "PLANNING"))
                client.load(
                    "llama",
                    str(folder),
                    verify=False,
                    progress=lambda event, s=stages: s.append((time.perf_counter(), str(event["stage"]))),
                )
                stages.append((time.perf_counter(), "SERVING"))
                held = [rank["bytes_held"] for rank in client.health()["ranks"]]
            reading = _reading(stages)
            report.add(
                case=f"this service, {ranks} ranks",
                seconds=stages[-1][0] - stages[0][0],
                reading_seconds=reading,
                mib_per_second=total / reading / 2**20,
                over_safetensors=total / reading / 2**20 / rate,
                largest_rank_mib=max(held) / 2**20,
                held_over_file=sum(held) / total,
            )
    return report


def _reading(stages: list[tuple[float, str]]) -> float:
    """Seconds from the last report of planning to the first that all is read."""
    begin = max(at for at, stage in stages if stage not in ("READING", "LOADED", "SERVING"))
    return min(at for at, stage in stages if stage in ("LOADED", "SERVING")) - begin
