"""Checkpoints of every kind: the model without its weights, and any slice of any weight, safely and at the speed of
the disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensor_parallel.checkpoint.load import Loaded, load_shards
from tensor_parallel.checkpoint.options import SourceOptions
from tensor_parallel.checkpoint.paths import confine
from tensor_parallel.checkpoint.source import Source
from tensor_parallel.errors import InvalidInput

KINDS = ("auto", "hf", "pt2", "factory")

__all__ = ["KINDS", "Loaded", "Source", "SourceOptions", "load_shards", "open_source"]


def open_source(
    path: str | os.PathLike[str],
    model_root: str | os.PathLike[str] | None = None,
    kind: str = "auto",
    options: Mapping[str, Any] | SourceOptions | None = None,
    *,
    factories: Sequence[str] = (),
) -> Source:
    """Open a checkpoint, having checked its files' headers but read none of its weights.

    ``path``: a Hugging Face directory, a ``.pt2`` file (both confined to ``model_root``) or
    ``package.module:factory`` (which must be in ``factories``). ``kind`` ``auto`` tells them apart by the path.
    Raises :class:`~tensor_parallel.errors.CheckpointError`, :class:`~tensor_parallel.errors.AccessDenied` for a
    path or factory that is not allowed, and :class:`~tensor_parallel.errors.InvalidInput` for a malformed option.
    Import of what a kind needs happens here.
    """
    if kind not in KINDS:
        raise InvalidInput(f"unknown kind {kind!r}; known are {', '.join(KINDS)}")
    parsed = options if isinstance(options, SourceOptions) else SourceOptions.parse(options or {}, factories)
    text = os.fspath(path)
    if kind == "auto":
        kind = _kind_of(text)
    if kind == "factory":
        from tensor_parallel.checkpoint.factory import FactorySource

        return FactorySource(text, parsed, None if model_root is None else os.fspath(model_root))
    found = confine(text, model_root)
    if kind == "pt2":
        from tensor_parallel.checkpoint.pt2 import ArchiveSource

        return ArchiveSource(found, parsed)
    from tensor_parallel.checkpoint.huggingface import HuggingFaceSource

    return HuggingFaceSource(found, parsed, Path("/" if model_root is None else model_root))


def _kind_of(text: str) -> str:
    from tensor_parallel.checkpoint.factory import is_factory_name

    if is_factory_name(text) and not os.path.exists(text):
        return "factory"
    return "pt2" if text.endswith(".pt2") else "hf"
