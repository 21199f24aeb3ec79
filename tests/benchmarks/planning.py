"""What planning costs: time and peak memory for two large shapes on eight ranks, from their configurations alone.

Each plan is made in a process of its own, by the library (tracing, solving and proving, after the imports) and by
``shardctl plan`` on a directory that holds nothing but ``config.json`` (the whole command).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Report

RANKS = 8
SHAPES = ("Llama-7B", "Mixtral-8x7B")


def config(shape: str) -> Any:
    """transformers' defaults are these shapes."""
    from transformers import LlamaConfig, MixtralConfig

    kind = {"Llama-7B": LlamaConfig, "Mixtral-8x7B": MixtralConfig}[shape]
    made = kind(use_cache=False, dtype="bfloat16")
    made.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    return made


def planning() -> Report:
    report = Report(f"planning for {RANKS} ranks", "python -m tests.benchmarks planning")
    for shape in SHAPES:
        report.rows.append({"shape": shape, "through": "make_plan", **_measured(_library(shape))})
        with tempfile.TemporaryDirectory() as directory:
            config(shape).save_pretrained(directory)
            report.rows.append({"shape": shape, "through": "shardctl plan", **_measured(_command(directory))})
    report.notes.append("seconds: wall clock of the plan (make_plan) or of the whole command; peak: resident memory")
    return report


def _library(shape: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.planning", shape]


def _command(directory: str) -> list[str]:
    shardctl = shutil.which("shardctl", path=str(Path(sys.executable).parent)) or "shardctl"
    return [shardctl, "plan", directory, "--ranks", str(RANKS), "--json"]


def _measured(command: list[str]) -> dict[str, Any]:
    """What the child says of its plan, its wall clock, processor time and peak resident memory."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = json.loads(output.read().decode() or "{}")
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}")
    counts, held = said.get("collectives", said), said["bytes_per_rank"]
    return {
        "seconds": said.get("seconds", wall),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,
        "all_reduces": counts["all_reduces"],
        "gib_per_rank": (max(held) if isinstance(held, list) else held) / 2**30,
    }


def main() -> int:
    """Plan one shape in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from tensor_parallel.planner import make_plan

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(sys.argv[1]), dtype=torch.bfloat16).eval()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    ids = torch.ones(2, 16, dtype=torch.long)
    start = time.perf_counter()
    plan = make_plan(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, RANKS)
    print(json.dumps({**plan.summary(), "seconds": time.perf_counter() - start}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
