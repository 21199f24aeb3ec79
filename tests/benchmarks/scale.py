"""The cost model: what it predicts for CPU ranks against what they measure, and what it predicts for 1 to 64 GPUs.

A rank's time is its matrices and then its plan's collectives, by ``planner.cost.Network``. On a GPU a matrix takes as
long as its arithmetic or the reading of its weights, whichever is longer (the roofline model; Williams et al., 2009);
on this machine, as long as one of that many rows was measured to take. Attention scores, norms and whatever could
overlap are left out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from tensor_parallel import DistributedModelWrapper
from tensor_parallel.planner import make_plan
from tensor_parallel.planner.cost import Network
from tensor_parallel.planner.cpu_linear import linear
from tensor_parallel.planner.plan import Plan
from tests.benchmarks.models import Mlp
from tests.benchmarks.report import Report
from tests.multiprocess.ranks import Place, Ranks

WIDTH, HIDDEN, LAYERS = 1024, 4096, 8
BATCHES = (1, 16, 128)
RANKS = (1, 2, 4)


@dataclass(frozen=True)
class Hardware:
    """Of one rank: floating-point operations and bytes of its memory, each per second; bytes of one element."""

    flops: float
    memory: float
    itemsize: int


@dataclass(frozen=True)
class Matrices:
    """Shapes of a model's weights that multiply, by name, as the plan divides them."""

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> Matrices:
        linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        return cls({name: tuple(module.weight.shape) for name, module in linears.items()})

    def held(self, plan: Plan, rank: int) -> float:
        """Elements on ``rank``."""
        total = 0.0
        for name, shape in self.shapes.items():
            shard = plan.shards[plan.tied.get(name, name)]
            share = 1.0 if shard.dim is None else shard.local_size(rank) / shape[shard.dim]
            total += prod(shape) * share
        return total

    def seconds(self, plan: Plan, rank: int, rows: int, hardware: Hardware) -> float:
        """Of one forward of ``rows`` rows (or tokens) on ``rank``: all matrices meet the same limit."""
        elements = self.held(plan, rank)
        return max(2 * rows * elements / hardware.flops, elements * hardware.itemsize / hardware.memory)


def collective_seconds(plan: Plan, network: Network, ranks: int, rows_scale: float = 1.0) -> float:
    """``rows_scale``: rows of the forward over rows of the example that the plan was made with."""
    return sum(network.seconds(c.kind, int(c.nbytes * rows_scale), ranks) for c in plan.collectives)


# ---- measured on this machine


def _median_seconds(function: Callable[[], Any], seconds: float = 0.4) -> float:
    function()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _calibrate(place: Place) -> dict[int, float]:
    """Seconds for each element of a matrix, by rows; of matrices that no cache holds, on every rank at once."""
    torch.set_num_threads(1)
    weights = [torch.randn(HIDDEN, WIDTH) for _ in range(8)]
    found = {}
    with torch.inference_mode():
        for rows in BATCHES:
            x = torch.randn(rows, WIDTH)
            found[rows] = _median_seconds(lambda x=x: [linear(x, weight) for weight in weights])
    return {rows: seconds / (8 * HIDDEN * WIDTH) for rows, seconds in found.items()}


def _network(place: Place) -> Network:
    """Latency from a small all-reduce, bandwidth from a large one."""
    torch.set_num_threads(1)
    group, taken = place.group("shm"), {}
    for size in (1 << 10, 1 << 20):
        tensor = torch.zeros(size // 4)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            group.all_reduce_sum_(tensor)
            times.append(time.perf_counter() - start)
        taken[size] = statistics.median(times)
    moved = 2 * (place.world_size - 1) / place.world_size * (1 << 20)
    return Network(taken[1 << 10], moved / max(1e-9, taken[1 << 20] - taken[1 << 10]))


def _forward_seconds(place: Place) -> tuple[Plan, dict[int, float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Mlp(WIDTH, HIDDEN, LAYERS).eval()
    group = place.group("shm") if place.world_size > 1 else None
    wrapped = DistributedModelWrapper(
        model, place.world_size, place.rank, {"x": torch.zeros(2, WIDTH)}, verify=False, group=group
    )
    found = {}
    with torch.inference_mode():
        for batch in BATCHES:
            x, times = torch.randn(batch, WIDTH), []
            for _ in range(30):
                start = time.perf_counter()
                wrapped(x=x)
                times.append(time.perf_counter() - start)
            found[batch] = statistics.median(times)
    return replace(wrapped.plan, artifact=None), found


def predictions() -> Report:
    report = Report(f"cost model on CPU ranks, {LAYERS} x MLP {WIDTH}-{HIDDEN}", "python -m tests.benchmarks scale")
    with torch.device("meta"):
        matrices = Matrices.of(Mlp(WIDTH, HIDDEN, LAYERS))
    for count in RANKS:
        with Ranks(count) as ranks:
            together = ranks.run(_calibrate, timeout=60)
            network = ranks.run(_network, timeout=60)[0] if count > 1 else Network()
            plan, measured = ranks.run(_forward_seconds, timeout=120)[0]
        for batch, seconds in measured.items():
            compute = matrices.held(plan, 0) * max(rates[batch] for rates in together)
            predicted = compute + collective_seconds(plan, network, count, batch / 2)
            report.add(
                ranks=count,
                batch=batch,
                measured_ms=seconds * 1e3,
                predicted_ms=predicted * 1e3,
                error=predicted / seconds - 1,
            )
    report.notes.append(
        f"calibrated on {len(os.sched_getaffinity(0))} cores with as many ranks at once, one thread each"
    )
    return report


# ---- on paper

H100 = Hardware(flops=0.55 * 989e12, memory=0.8 * 3.35e12, itemsize=2)  # bf16 SXM: what products and reads reach of it
NVLINK = Network(latency=12e-6, bandwidth=350e9)  # 8 GPUs of one host
FABRIC = Network(latency=30e-6, bandwidth=45e9)  # 400 Gb/s for each GPU between hosts
PER_HOST = 8
LAYERS_TRACED = 1  # every layer costs the same
SHRUNK = 8  # every width is divided by it for planning: the same plan, found in seconds for 64 ranks too


def scale() -> Report:
    """Llama 70B's sizes; the batch is decoding (32 sequences, a token each) and a prompt (4096 tokens)."""
    report = Report("predicted: Llama 70B, bf16, H100, 8 to a host", "python -m tests.benchmarks scale")
    model, layers = _llama_70b(), 80
    matrices = Matrices.of(model)
    body = Matrices({name: shape for name, shape in matrices.shapes.items() if ".layers." in name})
    head = Matrices({name: shape for name, shape in matrices.shapes.items() if ".layers." not in name})
    times = layers / LAYERS_TRACED
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    base: dict[int, float] = {}
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        plan = make_plan(model, example, ranks, gather_outputs=False, verify=False)
        network = NVLINK if ranks <= PER_HOST else FABRIC
        row: dict[str, Any] = {"gpus": ranks, "hosts": -(-ranks // PER_HOST)}
        row["weights_gib"] = _extrapolated(plan.bytes_per_rank[0] * SHRUNK**2, plan, layers) / 2**30
        for tokens in (32, 4096):
            compute = body.seconds(plan, 0, tokens, H100) * times + head.seconds(plan, 0, tokens, H100)
            compute *= SHRUNK**2
            first, rest = (
                replace(plan, collectives=plan.collectives[:1]),
                replace(plan, collectives=plan.collectives[1:]),
            )
            rows = SHRUNK * tokens / 8
            moved = collective_seconds(first, network, ranks, rows)  # the embedding's
            moved += collective_seconds(rest, network, ranks, rows) * times
            base.setdefault(tokens, compute)
            row[f"{tokens} tokens ms"] = (compute + moved) * 1e3
            row[f"{tokens} tokens efficiency"] = base[tokens] / (ranks * (compute + moved))
        report.add(**row)
    report.notes += [
        f"hardware as stated: {H100.flops / 1e12:.0f} TFLOP/s, {H100.memory / 1e12:.2f} TB/s; in a host "
        f"{NVLINK.latency * 1e6:.0f} us and {NVLINK.bandwidth / 1e9:.0f} GB/s, between hosts "
        f"{FABRIC.latency * 1e6:.0f} us and {FABRIC.bandwidth / 1e9:.0f} GB/s",
        f"planned on {LAYERS_TRACED} layer of 1/{SHRUNK} the width, scaled to {layers} layers and the full width; the "
        "planner's own collectives; a prediction, not measured",
    ]
    return report


def _llama_70b() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8192 // SHRUNK,
        intermediate_size=28672 // SHRUNK,
        num_hidden_layers=LAYERS_TRACED,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128 // SHRUNK,
        vocab_size=128256 // SHRUNK,
        use_cache=False,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _extrapolated(held: int, plan: Plan, layers: int) -> float:
    """Bytes of ``layers`` layers: the tables are held once, however many there are."""
    tables = 2 * 128256 * 8192 * 2 / plan.world_size
    return (held - tables) * layers / LAYERS_TRACED + tables
