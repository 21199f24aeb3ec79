"""``execution="compile"`` against eager: one forward on two ranks of one thread, and what compiling takes at load."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from tensor_parallel.planner import instantiate, make_plan
from tensor_parallel.planner.module import ShardedModule
from tensor_parallel.planner.rehearsal import check_compiler
from tests.benchmarks.models import Mlp
from tests.benchmarks.planner import _llama, _medians
from tests.benchmarks.report import Report
from tests.multiprocess.ranks import Place, Ranks

TOKENS = ((1, 16), (8, 128))
CASES = {
    "8 x MLP 1024-4096": ((1,), (128,)),
    "BERT 384, 6 layers": TOKENS,
    "GPT-2 384, 6 layers": TOKENS,
    "Llama 512, 4 layers": TOKENS,
    "T5 384, 6 layers": TOKENS,
    "ResNet-18": ((1, 64), (8, 128)),
}


def execution() -> Report:
    """Median of turns, in milliseconds; ``ratio`` below 1 says that compiling pays."""
    report = Report("execution, 2 ranks x 1 thread", "python -m tests.benchmarks compile")
    with Ranks(2) as ranks:
        for name, sizes in CASES.items():
            rows = ranks.run(_compared, name, sizes, timeout=240)[0]
            report.rows.extend({"model": name, **row} for row in rows)
    report.notes.append("compile_s: with a compiler's cache that has seen the model before or not, as the case may be")
    return report


def _compared(place: Place, name: str, sizes: tuple[tuple[int, ...], ...]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = _model(name)
    held = dict(model.state_dict()) | dict(model.named_buffers())
    group = place.group("shm")

    def module() -> ShardedModule:
        plan = make_plan(model, _inputs(name, sizes[-1]), 2, gather_outputs=False, verify=False)
        rank = place.rank
        made = instantiate(plan, model, rank=rank, group=group, read=lambda name, shard: shard.take(held[name], rank))
        assert isinstance(made, ShardedModule)
        return made.eval()

    eager, compiled = module(), module()
    check_compiler("cpu")
    start = time.perf_counter()
    functions = compiled.compile_programs(check=True)
    seconds = time.perf_counter() - start
    store = place.store("compiled")
    store.set(str(place.rank), "")
    store.wait(["0", "1"], timedelta(seconds=120))  # the other one's compiler may be slower than a forward is patient
    forwards: dict[str, Any] = {}  # all of a model take turns
    for size in sizes:
        given = _inputs(name, size)
        forwards[f"eager {size}"] = lambda x=given: eager(**x)
        forwards[f"compile {size}"] = lambda x=given: compiled(**x)
    times = _medians(place, forwards)
    return [
        {
            "size": size,
            "eager_ms": times[f"eager {size}"],
            "compile_ms": times[f"compile {size}"],
            "ratio": times[f"compile {size}"] / times[f"eager {size}"],
            "functions": functions,
            "compile_s": seconds,
        }
        for size in sizes
    ]


def _model(name: str) -> nn.Module:
    import transformers

    if "MLP" in name:
        return Mlp(1024, 4096, 8).eval()
    if "Llama" in name:
        return _llama(512, 4)
    shape = {"num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 4096}
    if "BERT" in name:
        config: Any = transformers.BertConfig(hidden_size=384, intermediate_size=1536, **shape)
        return transformers.BertModel(config).eval()
    if "GPT" in name:
        tokens = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=4096, **tokens)
        ).eval()
    if "T5" in name:
        return transformers.T5EncoderModel(
            transformers.T5Config(d_model=384, d_kv=64, d_ff=1536, num_layers=6, num_heads=6, vocab_size=4096)
        ).eval()
    return transformers.ResNetModel(
        transformers.ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2])
    ).eval()


def _inputs(name: str, size: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if "MLP" in name:
        return {"x": torch.randn(*size, 1024, generator=generator)}
    if "ResNet" in name:
        rows, side = size
        return {"pixel_values": torch.randn(rows, 3, side, side, generator=generator)}
    return {"input_ids": torch.randint(0, 4096, size, generator=generator)}
