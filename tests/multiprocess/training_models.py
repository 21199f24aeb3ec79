"""Tiny models of several families, with a batch to train them on: configurations of ``transformers``, and plain torch.

Sizes divide by two and by four, except the MLPs of BERT and T5.
GPT-2 and Llama have two layers, the others one. Dropout is off: the sharded model draws other masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, BATCH, LENGTH = 64, 2, 6


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    output: Callable[[Any], Tensor]

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The seeded model, in training mode, with biases that are not zero."""
        torch.manual_seed(0)
        model = self.build().train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype)

    def batch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.inputs().items()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy against fixed targets over the last dimension."""
        output = self.output(model(**batch))
        targets = torch.arange(output[..., 0].numel()) * 7 % output.shape[-1]
        return functional.cross_entropy(output.flatten(0, -2), targets)


def ids() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, LENGTH))


def _hugging_face(model_class: str, config_class: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))
        return model

    return build


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
}

TRANSFORMERS = {
    "gpt2": Case(
        _hugging_face(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        ),
        lambda: {"input_ids": ids()},
        _logits,
    ),
    "llama": Case(
        _hugging_face("LlamaForCausalLM", "LlamaConfig", **_DECODER), lambda: {"input_ids": ids()}, _logits
    ),
    "bert": Case(
        _hugging_face(
            "BertForMaskedLM", "BertConfig", vocab_size=VOCAB, hidden_size=16, intermediate_size=30,
            num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        lambda: {"input_ids": ids(), "attention_mask": torch.tensor([[1] * LENGTH, [1] * 4 + [0] * 2])},
        _logits,
    ),
    "t5": Case(
        _hugging_face(
            "T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=30, num_layers=1,
            num_heads=4, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
        ),
        lambda: {"input_ids": ids(), "decoder_input_ids": ids()},
        _logits,
    ),
    "vit": Case(
        _hugging_face(
            "ViTForImageClassification", "ViTConfig", hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=4, image_size=8, patch_size=4, num_labels=6,
        ),
        lambda: {"pixel_values": torch.randn(BATCH, 3, 8, 8)},
        _logits,
    ),
    "mixtral": Case(
        _hugging_face(
            "MixtralForCausalLM", "MixtralConfig", **{**_DECODER, "num_hidden_layers": 1}, num_local_experts=4,
            num_experts_per_tok=2, experts_implementation="batched_mm",  # the kernel of grouped products has no float64
        ),
        lambda: {"input_ids": ids()},
        _logits,
    ),
}  # fmt: skip
