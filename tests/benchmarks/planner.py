"""One forward on two ranks: planned, by hand, by transformers' own plans, and unsharded on one thread."""

from __future__ import annotations

import contextlib
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensor_parallel import ColumnParallelLinear, DistributedModelWrapper, RowParallelLinear
from tensor_parallel.group import Group
from tests.benchmarks.models import Mlp
from tests.benchmarks.report import Report
from tests.multiprocess.ranks import Place, Ranks

LLAMAS = ((256, 4, (1, 8)), (512, 8, (1, 16)), (1024, 4, (4, 64)))  # hidden, layers, (batch, tokens)
MLPS = ((1024, 4096, 8, 1), (1024, 4096, 8, 16), (1024, 4096, 8, 128))  # width, hidden, layers, batch
ROUNDS = 5
SECONDS = 0.3

COMPARABLE = find_spec("accelerate") is not None  # transformers' tp_plan asks for it

Forward = Callable[[], Any]


def _llama(hidden: int, layers: int) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(2, hidden // 128),
        vocab_size=4096,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _medians(place: Place, forwards: dict[str, Forward]) -> dict[str, float]:
    """Milliseconds by name: the median of rounds in which all take turns, so that all meet the same load."""
    store = place.store("pace")
    taken: dict[str, list[float]] = {name: [] for name in forwards}
    with torch.inference_mode():
        for name, forward in forwards.items():
            start = time.perf_counter()
            forward()
            forward()
            if place.rank == 0:  # all ranks must call as often
                seconds = (time.perf_counter() - start) / 2
                store.set(f"calls/{name}", str(int(min(200, max(3, SECONDS / seconds)))))
            calls = int(store.get(f"calls/{name}"))
            forwards[name] = _repeated(forward, calls)
        for _ in range(ROUNDS):
            for name, forward in forwards.items():
                taken[name].append(forward())
    return {name: statistics.median(times) * 1e3 for name, times in taken.items()}


def _repeated(forward: Forward, calls: int) -> Callable[[], float]:
    def run() -> float:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            forward()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return run


class ByHand(nn.Module):
    """``Mlp`` divided as Megatron does it, written with the library's layers."""

    def __init__(self, whole: Mlp, group: Group) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, layer in enumerate(whole.body):
            if not isinstance(layer, nn.Linear):
                layers.append(nn.ReLU())
            else:  # by rows of the weight first, by its columns then: one all-reduce for the pair
                kind = RowParallelLinear if index % 3 == 0 else ColumnParallelLinear
                layers.append(kind.from_linear(layer, group.world_size, group.rank, group=group))
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _mlp_times(place: Place, width: int, hidden: int, layers: int, batch: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = Mlp(width, hidden, layers).eval(), torch.randn(batch, width)
    forwards: dict[str, Forward] = {}
    for kind in ("shm", "gloo"):
        group = place.group(kind)
        planned = DistributedModelWrapper(model, 2, place.rank, {"x": x}, verify=False, group=group)
        forwards[f"planned_{kind}"] = lambda planned=planned: planned(x=x)
    by_hand = ByHand(model, place.group("shm")).eval()
    forwards["by_hand_shm"] = lambda: by_hand(x)
    return _medians(place, forwards)


def _llama_times(
    place: Place, hidden: int, layers: int, shape: tuple[int, int], folder: str, port: int
) -> dict[str, float]:
    torch.set_num_threads(1)
    model, ids = _llama(hidden, layers), torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(0))
    forwards: dict[str, Forward] = {}
    for kind in ("shm", "gloo"):
        group = place.group(kind)
        planned = DistributedModelWrapper(model, 2, place.rank, {"input_ids": ids}, verify=False, group=group)
        forwards[f"planned_{kind}"] = lambda planned=planned: planned(input_ids=ids)
    if not COMPARABLE:
        return _medians(place, forwards)
    with place.launched(port):
        forwards["transformers_gloo"] = _transformers(folder, ids)
        try:
            return _medians(place, forwards)
        finally:
            torch.distributed.destroy_process_group()


def _transformers(folder: str, ids: Tensor) -> Forward:
    import transformers

    torch.distributed.init_process_group("gloo")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    return lambda: theirs(input_ids=ids, use_cache=False)


def _alone(place: Place, make: Callable[[], nn.Module], inputs: dict[str, Tensor]) -> float:
    torch.set_num_threads(1)
    model = make()
    return _medians(place, {"alone": lambda: model(**inputs)})["alone"]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def planner() -> Report:
    report = Report("one forward, 2 ranks x 1 thread, ms", "python -m tests.benchmarks planner")
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        one, two = stack.enter_context(Ranks(1)), stack.enter_context(Ranks(2))
        for hidden, layers, shape in LLAMAS:
            folder = Path(scratch, str(hidden))
            _llama(hidden, layers).save_pretrained(folder)
            ids = torch.zeros(shape, dtype=torch.long)
            alone = one.run(_alone_llama, hidden, layers, ids, timeout=120)[0]
            times = two.run(_llama_times, hidden, layers, shape, str(folder), _free_port(), timeout=200)[0]
            report.add(
                model=f"Llama {hidden}, {layers} layers, {shape[0]} x {shape[1]} tokens", unsharded=alone, **times
            )
        for width, inner, layers, batch in MLPS:
            alone = one.run(_alone_mlp, width, inner, layers, batch, timeout=120)[0]
            times = two.run(_mlp_times, width, inner, layers, batch, timeout=120)[0]
            report.add(model=f"{layers} x MLP {width}-{inner}, batch {batch}", unsharded=alone, **times)
    if not COMPARABLE:
        report.notes.append('transformers tp_plan="auto" was left out: it needs accelerate, which is not installed')
    return report


def _alone_llama(place: Place, hidden: int, layers: int, ids: Tensor) -> float:
    return _alone(place, lambda: _llama(hidden, layers), {"input_ids": ids})


def _alone_mlp(place: Place, width: int, hidden: int, layers: int, batch: int) -> float:
    return _alone(place, lambda: Mlp(width, hidden, layers).eval(), {"x": torch.randn(batch, width)})
