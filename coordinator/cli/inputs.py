"""A model's inputs from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.cli import tensor_files
from coordinator.cli.failures import USAGE, Failure
from coordinator.cli.tensor_files import Arrays
from coordinator.client.arrays import numpy_dtype
from coordinator.dtypes import from_torch_name

Describe = Callable[[], dict[str, Any]]


def gather(given: Sequence[str], texts: Sequence[str], tokenizer: Path | None, describe: Describe) -> Arrays:
    """Inputs by name. ``describe`` gives the model's description, and is asked only where an element type or the
    tokenizer's place depends on it. Raises Failure for what cannot be understood."""
    found: Arrays = {}
    for text in given:
        found |= _one(text, describe)
    if texts:
        found |= tokenize(texts, tokenizer, describe())
    return found


def _one(text: str, describe: Describe) -> Arrays:
    name, equals, value = text.partition("=")
    if not equals:
        path = Path(text.removeprefix("@"))
        if path.suffix in (".npz", ".safetensors"):
            return tensor_files.read(path)
        raise Failure(f"--input {text!r} is not NAME=VALUE, nor a .npz or .safetensors file", USAGE)
    name, _, kind = name.partition(":")
    if value in ("-", "@-"):
        return {
            name: tensor_files.read_npy(sys.stdin.buffer)
            if value == "-"
            else _literal(name, sys.stdin.read(), kind, describe)
        }
    path = Path(value.removeprefix("@"))
    if path.suffix in tensor_files.SUFFIXES:
        return {name: _pick(path, name)}
    if value.startswith("@"):
        try:
            value = path.read_text(encoding="utf-8")
        except OSError as error:
            raise Failure(f"{path}: {error.strerror}", USAGE) from None
    return {name: _literal(name, value, kind, describe)}


def _pick(path: Path, name: str) -> Any:
    arrays = tensor_files.read(path)
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    if name not in arrays:
        raise Failure(f"{path} has no array {name!r}; it has {', '.join(sorted(arrays))}", USAGE)
    return arrays[name]


def _literal(name: str, text: str, kind: str, describe: Describe) -> Any:
    """A JSON value, of the element type given (``x:float16=[1]``), else of the one that the model declares."""
    try:
        value = np.asarray(json.loads(text))
    except json.JSONDecodeError:
        raise Failure(
            f"--input {name}={_short(text)!r} is neither JSON nor a file that ends in .npy, .npz or .safetensors "
            f"(@FILE reads JSON from FILE)",
            USAGE,
        ) from None
    except ValueError as error:
        raise Failure(f"--input {name}: {error}", USAGE) from None
    if value.dtype.kind not in "biuf":
        raise Failure(f"--input {name}={_short(text)!r} is JSON, but no array of numbers", USAGE)
    kind = kind or _declared(name, describe()) or ("float32" if value.dtype.kind == "f" else value.dtype.name)
    try:
        with np.errstate(over="ignore"):  # 1e39 as float32 is infinity, as in any language
            return value.astype(numpy_dtype(from_torch_name(kind)))
    except KeyError:
        raise Failure(f"--input {name}: there is no element type {kind!r}", USAGE) from None


def _declared(name: str, model: dict[str, Any]) -> str:
    return next((spec["dtype"] for spec in model.get("inputs", ()) if spec["name"] == name), "")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def tokenize(texts: Sequence[str], tokenizer: Path | None, model: dict[str, Any]) -> Arrays:
    """Those of input_ids, attention_mask and token_type_ids that the model takes, one row per text, padded."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Failure("--text needs the tokenizers package: pip install tokenizers", USAGE) from None
    path = tokenizer or Path(model.get("path", "")) / "tokenizer.json"
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise Failure(f"--text: no {str(path)!r} here; give the model's tokenizer.json with --tokenizer", USAGE)
    made = Tokenizer.from_file(str(path))
    made.enable_padding(**(made.padding or {}) | {"length": None})
    lines = made.encode_batch(list(texts))
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    taken = {spec["name"] for spec in model.get("inputs", ())} or {"input_ids", "attention_mask"}
    return {
        name: np.array([getattr(line, column) for line in lines], np.int64)
        for name, column in columns.items()
        if name in taken
    }
