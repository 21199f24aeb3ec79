"""Load: how fast a checkpoint reaches the ranks, against one process reading the same bytes with safetensors."""

from __future__ import annotations

import json
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from coordinator.client import Client
from tests.benchmarks.cluster import up
from tests.benchmarks.report import Report


def checkpoint(folder: Path, layers: int, hidden: int = 3072) -> int:
    """A Llama; few wide layers are much to read and little to plan. Returns its bytes."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=min(8, hidden // 128),
        vocab_size=16000,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(1e-3 * (number + 1))  # what is read matters to nobody, and random numbers take a minute
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _read_all(folder: Path, *, keep: bool) -> float:
    """Seconds to copy every tensor out of the files; into memory used again and again, or ``keep`` them all."""
    kept: list[torch.Tensor] = []
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  a safe_open is no mapping
                tensor = file.get_tensor(name).clone()
                if keep:
                    kept.append(tensor)
    return time.perf_counter() - start


def loading(*, layers: int = 3) -> Report:
    """``seconds`` is a Load as its caller sees it. Of that, by the ranks' own clocks: ``planning_seconds`` and
    ``reading_seconds``, of the slowest rank, and ``first_to_last_seconds`` from when the first rank began to read until
    the last one had: ranks that do not end planning together do not read together either.

    ``over_safetensors`` compares reading with the faster way of safetensors, that reuses its memory; weights that are
    kept need memory of their own, which ranks prepare while they plan. ``read_over_file``: bytes that all ranks have
    asked the files for, over the files'; 1 means that they were read once, not once by each rank.

    ``new_version_seconds``: the same checkpoint loaded again, as a version that follows the one that serves. It has the
    plan of that one.
    """
    report = Report("load", "python -m tests.benchmarks loading")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "llama")
        total = checkpoint(folder, layers)
        floor = min(_read_all(folder, keep=False) for _ in range(6))
        for case, seconds in (("reused", floor), ("kept", _read_all(folder, keep=True))):
            report.add(
                case=f"safetensors, memory {case}", reading_seconds=seconds, mib_per_second=total / seconds / 2**20
            )
        for ranks in (1, 2, 4):
            report.add(**_load(ranks, folder, Path(root, "log"), total, floor))
    return report


def _finished(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if '"load_finished"' in line]


def _load(ranks: int, folder: Path, log: Path, total: int, floor: float) -> dict[str, Any]:
    with (
        up(ranks, model_root=str(folder.parent), deadline=60, log=log) as target,
        Client(target, timeout=90) as client,
    ):
        start = time.perf_counter()
        client.load("llama", str(folder), verify=False)
        seconds = time.perf_counter() - start
        lines = _finished(log)
        held = [rank["bytes_held"] for rank in client.health()["ranks"]]
        start = time.perf_counter()
        client.load("llama", str(folder), verify=False)
        again = time.perf_counter() - start
    ended = [line for line in lines if line["logger"] == "shardd"]
    assert len(ended) == ranks, f"{len(ended)} of {ranks} ranks have logged that they loaded"
    slowest = max(line["reading_seconds"] for line in ended)
    at = [(datetime.fromisoformat(line["ts"]).timestamp(), line["reading_seconds"]) for line in ended]
    return {
        "case": f"this service, {ranks} ranks",
        "seconds": seconds,
        "new_version_seconds": again,
        "planning_seconds": max(line["seconds"] - line["reading_seconds"] for line in ended),
        "reading_seconds": slowest,
        "first_to_last_seconds": max(end for end, _ in at) - min(end - took for end, took in at),
        "mib_per_second": total / slowest / 2**20,
        "over_safetensors": floor / slowest,
        "largest_rank_mib": max(held) / 2**20,
        "largest_read_mib": max(line["bytes_read"] for line in ended) / 2**20,
        "read_over_file": sum(line["bytes_read"] for line in ended) / total,
    }
