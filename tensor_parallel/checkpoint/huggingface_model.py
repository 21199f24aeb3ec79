"""From stored names to a model's weights, by the very code ``transformers`` loads checkpoints with.

``transformers`` knows renamed layers, prefixes of base models, weights stored per expert and used stacked, tied
weights, keys to ignore and modules kept in float32. All of it is code that handles tensors; it is run here on
tensors that hold expressions instead of data (:mod:`tensor_parallel.checkpoint.lazy`), so its result is exactly
what ``from_pretrained`` would load, and no byte has been read. This is the only module that touches the inside of
``transformers``.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensor_parallel.checkpoint.default_dtype import default_dtype
from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.checkpoint.memory import available_bytes
from tensor_parallel.checkpoint.options import SourceOptions
from tensor_parallel.checkpoint.stored import StoredTensor
from tensor_parallel.errors import CheckpointError, DoesNotFit, InvalidInput, TensorParallelError

# A checkpoint is a directory: nothing it names may be fetched. Read by huggingface_hub when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TASKS = {
    "feature-extraction": "AutoModel", "text-generation": "AutoModelForCausalLM", "fill-mask": "AutoModelForMaskedLM",
    "text2text-generation": "AutoModelForSeq2SeqLM", "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification", "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice", "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification", "image-text-to-text": "AutoModelForImageTextToText",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq", "object-detection": "AutoModelForObjectDetection",
}  # fmt: skip

_ATTENTION = ("sdpa", "eager")

# Which code runs, and what other options say.
_NOT_OVERRIDDEN = {"model_type", "architectures", "auto_map", "dtype", "torch_dtype"}

_resolving = threading.Lock()  # transformers patches its own classes while it builds a model: one at a time


@dataclass(frozen=True)
class Resolved:
    """A model, the value of each of its parameters and buffers by name, and the stored tensors it has no use for."""

    model: nn.Module
    tensors: dict[str, Tensor]
    unused: tuple[str, ...]


def with_overrides(described: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parsed ``config.json`` with the values that a load asks for instead; of a nested config, those it names.

    Raises :class:`InvalidInput` for what this type of model does not have, :class:`CheckpointError` as `make_config`.
    """
    if not changes:
        return described
    config = make_config(described, SourceOptions())
    unknown = [key for key in changes if key not in described and callable(getattr(config, key, callable))]
    if refused := sorted({key for key in changes if key.startswith("_")} | _NOT_OVERRIDDEN & set(changes)):
        raise InvalidInput(f"option arguments: {', '.join(refused)} cannot be overridden")
    if unknown:
        raise InvalidInput(f"option arguments: a {described['model_type']} config has no {', '.join(sorted(unknown))}")
    return _merged(described, changes)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: (old[key], value) for key, value in new.items() if key in old}
    nested = {
        key: _merged(before, after)
        for key, (before, after) in both.items()
        if isinstance(before, Mapping) and isinstance(after, Mapping)
    }
    return {**old, **new, **nested}


def make_config(described: Mapping[str, Any], options: SourceOptions) -> Any:
    """The ``PreTrainedConfig`` of a parsed ``config.json``, cache off. Raises :class:`CheckpointError`."""
    from transformers import CONFIG_MAPPING

    model_type = described["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"config.json: model_type {model_type!r} is not known to the installed transformers")
    try:
        build = CONFIG_MAPPING[model_type]
        values = build._decode_special_floats(copy.deepcopy(dict(described)))  # infinities, which JSON has no word for
        config = build.from_dict(values)
    except Exception as error:  # whatever its validation raises, the config is at fault
        raise CheckpointError(f"config.json is not a valid {model_type} config: {_first_line(error)}") from error
    for part in _configs(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
        part.return_dict = True
    if options.attention is not None and options.attention not in _ATTENTION:
        raise CheckpointError(f"option attention must be one of {', '.join(_ATTENTION)}, not {options.attention}")
    config._attn_implementation = options.attention
    return config


def model_class(described: Mapping[str, Any], config: Any, options: SourceOptions) -> Any:
    """The class to build: the one asked for, else the auto class of the task asked for, else the one
    ``architectures`` names.
    """
    import transformers

    named = described.get("architectures")
    wanted = options.architecture
    if wanted is None and options.task is None and isinstance(named, list) and named:
        wanted = named[0]
    if wanted is None:
        task = options.task or "feature-extraction"
        if task not in TASKS:
            raise CheckpointError(f"unknown task {task}; known are {', '.join(TASKS)}")
        mapping = getattr(transformers, TASKS[task])._model_mapping
        if type(config) not in mapping:
            raise CheckpointError(f"a {config.model_type} model has no form for task {task}")
        found = mapping[type(config)]
        return found[0] if isinstance(found, list | tuple) else found
    found = getattr(transformers, wanted, None) if isinstance(wanted, str) and re.fullmatch(r"\w+", wanted) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json: {wanted!r} is not a model class of the installed transformers; custom code is never run"
        )
    return found


def serving_dtype(config: Any, stored: Mapping[str, StoredTensor], asked: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else the config's, else that of the first stored float tensor, as ``dtype="auto"`` means."""
    if asked is not None:
        return asked
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = (t.dtype for t in stored.values() if t.dtype.is_floating_point and t.dtype.itemsize > 1)
    return next(floats, torch.float32)


def resolve(build: Any, config: Any, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> Resolved:
    """The model of class ``build`` and where each of its tensors comes from.

    Raises :class:`CheckpointError` naming every tensor that is missing or of another shape than the model's.
    """
    with _resolving:
        model = _empty_model(build, config, dtype)
        try:
            return _resolve(build, model, stored, dtype)
        except TensorParallelError:
            raise
        except Exception as error:  # names and shapes from a file, in code that expects a well-formed checkpoint
            raise CheckpointError(f"the checkpoint does not fit {build.__name__}: {_first_line(error)}") from error


def _resolve(build: Any, model: Any, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> Resolved:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    load = LoadStateDictConfig(
        device_map={"": "cpu"},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    lazy = {name: LazyTensor.stored(tensor) for name, tensor in stored.items()}
    with _quiet():
        info, _ = build._load_pretrained_model(model, lazy, None, load)
        _refuse_wrong(info)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    absent = set(info.missing_keys)
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        raise CheckpointError(f"missing from the checkpoint: {_listed(info.missing_keys)}")
    _compute_the_rest(model, absent)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values: dict[int, Tensor] = {
        id(value): _value(value) for _, value in named
    }  # one object per distinct tensor: ties stay visible
    return Resolved(model, {name: values[id(value)] for name, value in named}, tuple(sorted(info.unexpected_keys)))


def without_weights(build: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model as its config alone describes it: weights on the meta device, buffers computed."""
    with _resolving:
        model = _empty_model(build, config, dtype)
        model.tie_weights()
        _compute_the_rest(model, set())
    found: nn.Module = model.eval()
    return found


def _empty_model(build: Any, config: Any, dtype: torch.dtype) -> Any:
    from transformers import initialization

    config = copy.deepcopy(config)
    for part in _configs(config):
        part.dtype = dtype
    try:
        # As from_pretrained builds, but for the default dtype, which must not change for what other threads serve.
        with default_dtype(dtype), initialization.no_tie_weights(), torch.device("meta"):
            return build(config)
    except Exception as error:  # model code raises anything for sizes that do not fit together
        raise CheckpointError(f"{build.__name__} cannot be built from config.json: {_first_line(error)}") from error


def _compute_the_rest(model: Any, absent: set[str]) -> None:
    """Give a value to what is in no checkpoint by design: non-persistent buffers, and weights listed as optional."""
    needed = [model.get_parameter_or_buffer(name) for name in absent - model.all_tied_weights_keys.keys()]
    needed += [buffer for _, buffer in model.named_non_persistent_buffers()]
    size, available = sum(one.numel() * one.element_size() for one in needed), available_bytes(torch.device("cpu"))
    if available is not None and size > available:
        raise DoesNotFit(f"config.json asks for {size / 2**30:.0f} GiB of computed buffers, more than there is memory")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # should any of it be random, it must be alike on every rank
        model._move_missing_keys_from_meta_to_device(absent, {"": "cpu"}, None, None)
        model._initialize_missing_keys(False)


def _value(tensor: Tensor) -> Tensor:
    return LazyTensor(tensor.node) if isinstance(tensor, LazyTensor) else tensor.detach()


def _refuse_wrong(info: Any) -> None:
    if info.mismatched_keys:
        shown = [
            f"{name} is {tuple(got)}, the model needs {tuple(want)}" for name, got, want in sorted(info.mismatched_keys)
        ]
        raise CheckpointError(f"wrong shape: {_listed(shown)}")
    if info.conversion_errors:
        name, text = sorted(info.conversion_errors.items())[0]
        reason = text.strip().splitlines()[-1]
        raise CheckpointError(f"the stored tensors of {name} cannot be converted to the model's: {reason}")


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _configs(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar on the stderr of a daemon whose every line is JSON."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _listed(names: Any, at_most: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - at_most} more" if len(ordered) > at_most else ""
    return ", ".join(ordered[:at_most]) + more


def _first_line(error: Exception) -> str:
    """What an exception says in one line; where the first only announces the next ("...:"), both."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {said}"
