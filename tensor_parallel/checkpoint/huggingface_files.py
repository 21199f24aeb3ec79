"""The files of a Hugging Face directory: its config, and its tensors in one safetensors file or several with an
index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensor_parallel.checkpoint.paths import read_small
from tensor_parallel.checkpoint.safetensors_header import read_header
from tensor_parallel.checkpoint.stored import StoredFile, StoredTensor
from tensor_parallel.errors import CheckpointError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MAX_CONFIG_BYTES, _MAX_INDEX_BYTES = 16 << 20, 256 << 20

# Keys of a config that choose code rather than numbers: kernels fetched from a hub, or classes from the directory.
_CODE_KEYS = frozenset({
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "fusion_config",
    "kernel_config", "distributed_config", "transformers_weights", "name_or_path", "_name_or_path", "use_kernels",
})  # fmt: skip


def read_config(directory: Path, root: Path | None = None) -> dict[str, Any]:
    """The parsed ``config.json`` without what would choose code to run. Raises :class:`CheckpointError`."""
    config = _read_json(directory / CONFIG, directory, _MAX_CONFIG_BYTES, root)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{CONFIG} has no model_type")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{CONFIG} describes a quantised checkpoint (quantization_config), which is not supported yet"
        )
    cleaned = _without_code(config)
    assert isinstance(cleaned, dict)
    return cleaned


def read_tensors(directory: Path, root: Path | None = None) -> dict[str, StoredTensor]:
    """Every tensor of the directory by its stored name. Raises :class:`CheckpointError` naming what is missing or
    wrong.
    """
    if (directory / SINGLE).exists() or (directory / SINGLE).is_symlink():
        return read_header(StoredFile(directory / SINGLE, directory, root))
    if not (directory / INDEX).exists():
        raise CheckpointError(_why_no_weights(directory))
    index = _read_json(directory / INDEX, directory, _MAX_INDEX_BYTES, root).get("weight_map")
    if not isinstance(index, dict) or not all(_is_file_name(file) for file in index.values()):
        raise CheckpointError(f"{INDEX}: weight_map must map tensor names to safetensors files of the same directory")
    headers = {file: read_header(StoredFile(directory / file, directory, root)) for file in sorted(set(index.values()))}
    for name, file in index.items():
        if name not in headers[file]:
            raise CheckpointError(f"{INDEX} places tensor {name} in {file}, which does not hold it")
    tensors: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors and index.get(name) != file:
                continue  # stored twice: the index decides
            tensors[name] = tensor
    return tensors


def _read_json(path: Path, directory: Path, limit: int, root: Path | None) -> dict[str, Any]:
    try:
        value = json.loads(read_small(path, directory, limit, root))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object")
    return value


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in _CODE_KEYS}
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _why_no_weights(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if pickled:
        return f"{', '.join(pickled)}: pickled weights are never read; save the model as safetensors"
    parts = [name for name in names if name.endswith(".safetensors")]
    if parts:
        return f"{INDEX} is missing: it says which of {', '.join(parts)} holds which tensor"
    return f"{SINGLE} is missing: the directory holds no weights"
