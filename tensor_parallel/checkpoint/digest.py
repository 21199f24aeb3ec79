"""Identity of a checkpoint, and of what a rank holds of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from tensor_parallel.checkpoint.stored import StoredFile, StoredTensor

_SAMPLES, _SAMPLE_BYTES = 256, 4096
_HASHED_AT_ONCE = 64 << 20


def source_digest(described: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> str:
    """Digest of a checkpoint that costs about a megabyte of reading a file, whatever its size: hexadecimal, 32
    characters.

    Covers ``described`` (config and options), every tensor's name, dtype, shape and place, and 256 samples of 4 KiB
    spread over each file. Two checkpoints of one architecture, such as a model and its fine-tuned successor, thus
    differ although their headers are equal. Edits that touch no sample pass unseen here and are caught by
    :func:`content_digest`.
    """
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    files: dict[str, StoredFile] = {}
    for tensor in sorted(tensors, key=lambda tensor: (tensor.file.name, tensor.offset, tensor.name)):
        files[tensor.file.name] = tensor.file
        entry = [tensor.name, tensor.file.name, tensor.offset, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(entry).encode())
    for name in sorted(files):
        file = files[name]
        digest.update(f"{name}:{file.size}".encode())
        step = max(_SAMPLE_BYTES, file.size // _SAMPLES // _SAMPLE_BYTES * _SAMPLE_BYTES)
        for offset in range(0, file.size, step):
            digest.update(file.read(offset, min(_SAMPLE_BYTES, file.size - offset)))
    return digest.hexdigest()[:32]


def content_digest(tensor: Tensor) -> str:
    """XXH3 of a tensor's bytes in row-major order. Releases the GIL; a tensor on a GPU is fetched a part at a time."""
    digest = xxhash.xxh3_128()
    flat = (
        tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    )
    for start in range(0, flat.numel(), _HASHED_AT_ONCE):
        digest.update(flat[start : start + _HASHED_AT_ONCE].cpu().numpy().data)
    return digest.hexdigest()


def combined_digest(parts: Mapping[str, tuple[torch.dtype, Iterable[int], str]]) -> str:
    """One digest of named tensors, given each one's dtype, shape and content digest."""
    lines = (f"{name}|{dtype}|{tuple(shape)}|{content}\n" for name, (dtype, shape, content) in sorted(parts.items()))
    return xxhash.xxh3_128("".join(lines).encode()).hexdigest()
