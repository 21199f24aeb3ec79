"""Example inputs of a Hugging Face model, from what its ``forward`` takes and its config says of sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensor_parallel.checkpoint.constraints import Constraints
from tensor_parallel.checkpoint.options import random_input
from tensor_parallel.errors import InvalidInput

BATCH, LENGTH = 2, 16

# A request may leave these out; they then have the value the model itself would assume.
DEFAULTS = {"attention_mask": ("input_ids", 1), "token_type_ids": ("input_ids", 0)}


def infer_inputs(model: Any) -> dict[str, Tensor]:
    """Inputs by argument name: the model's main one and those it is normally called with (masks, segment ids,
    decoder ids).

    Raises :class:`InvalidInput` if the model takes something of which neither its name nor its config tells the
    shape: the inputs then have to be given.
    """
    accepted = inspect.signature(model.forward).parameters
    config, text = model.config, model.config.get_text_config()
    length = max(2, min(LENGTH, (getattr(text, "max_position_embeddings", None) or 2 * LENGTH) // 2))
    makers = {
        "input_ids": lambda: _ids(length, model, text),
        "attention_mask": lambda: torch.ones(BATCH, length, dtype=torch.int64),
        "token_type_ids": lambda: torch.zeros(BATCH, length, dtype=torch.int64),
        "bbox": lambda: torch.zeros(BATCH, length, 4, dtype=torch.int64),
        "pixel_values": lambda: random_input(_image_shape(config), model.dtype),
        "input_values": lambda: random_input(_audio_shape(config), model.dtype),
        "input_features": lambda: random_input(_feature_shape(config), model.dtype),
        "decoder_input_ids": lambda: _ids(max(2, length - 4), model, text),
    }
    return {name: makers[name]() for name in _wanted(model, accepted, config) if name in accepted}


def infer_constraints(model: Any, inputs: Mapping[str, Tensor]) -> Constraints:
    """Text inputs share batch and length; no text is longer than a table of positions that the model learnt.

    A lookup past such a table would be an error of the whole model, or zeros where the table is divided.
    """
    shapes: dict[str, tuple[int | str, ...]] = {}
    for name in ("input_ids", "attention_mask", "token_type_ids", "bbox"):
        if name in inputs and "input_ids" in inputs:
            shapes[name] = ("batch", "length", *inputs[name].shape[2:])
    if "decoder_input_ids" in inputs:
        shapes["decoder_input_ids"] = ("batch" if shapes else "decoder batch", "decoder length")
    limit = _longest_text(model)
    return Constraints(shapes, dict.fromkeys(("length", "decoder length"), (1, limit)))


def _longest_text(model: Any) -> int | None:
    """Rows of the smallest learnt position table, recognised by its size, less those that no position uses."""
    text = model.config.get_text_config()
    named = ("max_position_embeddings", "n_positions", "max_target_positions")
    sizes = {size for name in named if isinstance(size := getattr(text, name, None), int)}
    vocabulary = _vocabulary(model)
    limits = []
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is vocabulary:
            continue
        offset = getattr(module, "offset", 0)
        if module.num_embeddings - offset in sizes:
            unused = 0 if module.padding_idx is None or offset else module.padding_idx + 1
            limits.append(module.num_embeddings - offset - unused)
    return min(limits, default=None)


def _wanted(model: Any, accepted: Any, config: Any) -> list[str]:
    main = model.main_input_name
    names: list[str] = []
    if "input_ids" in accepted and (main == "input_ids" or hasattr(config, "text_config")):
        names += ["input_ids", "attention_mask"]
        if getattr(config, "type_vocab_size", 0) and config.type_vocab_size > 1:
            names.append("token_type_ids")
        names.append("bbox")
    if "pixel_values" in accepted and (main == "pixel_values" or hasattr(config, "vision_config")):
        names.append("pixel_values")
    if main in ("input_values", "input_features"):
        names.append(main)
    if main not in names:
        raise InvalidInput(
            f"the inputs of {type(model).__name__} (main input {main}) cannot be inferred: give them in option inputs"
        )
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return names


def _ids(length: int, model: Any, text: Any) -> Tensor:
    weight = getattr(_vocabulary(model), "weight", None)
    known = getattr(text, "vocab_size", None) or (weight.shape[0] if weight is not None else 2)
    return random_input((BATCH, length), torch.int64, 0, int(known), seed=length)


def _vocabulary(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model of sound or images
        return None


def _image_shape(config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    shape = (BATCH, getattr(vision, "num_channels", 3), height, width)
    frames = getattr(vision, "num_frames", None)
    return (BATCH, frames, *shape[1:]) if frames else shape


def _audio_shape(config: Any) -> tuple[int, ...]:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # spectrogram transformers
        return (BATCH, config.max_length, config.num_mel_bins)
    return (BATCH, 4000)


def _feature_shape(config: Any) -> tuple[int, ...]:
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    if hasattr(config, "input_feat_per_channel"):
        return (BATCH, 4 * LENGTH, bins)
    if hasattr(
        config, "max_source_positions"
    ):  # the encoder's convolutions halve the length, which must then match its table
        return (BATCH, bins, 2 * config.max_source_positions)
    return (BATCH, 4 * LENGTH, bins)
