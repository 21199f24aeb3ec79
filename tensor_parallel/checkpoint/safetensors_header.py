"""The safetensors header: what a file says it holds, checked against the file before a byte of it is used.

Format: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape, data_offsets), then the
data. Read here, and not through ``safetensors.safe_open``, because slices are read straight into their place by
several threads.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import torch

from tensor_parallel.checkpoint.stored import StoredFile, StoredTensor
from tensor_parallel.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32":
    torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16":
    torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3":
    torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def read_header(file: StoredFile) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises :class:`CheckpointError`, naming file and tensor, for a truncated file, a header that is not the format's, an
    unknown dtype, a shape that disagrees with its bytes, and data that overlaps, leaves gaps or lies outside the file.
    """
    header_bytes = _header_bytes(file)
    try:
        header = json.loads(header_bytes, object_pairs_hook=lambda pairs: _unique(pairs, file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: the safetensors header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: the safetensors header is not an object")
    header.pop("__metadata__", None)
    start = 8 + len(header_bytes)
    tensors = {name: _tensor(name, entry, file, start) for name, entry in header.items()}
    _check_layout(tensors, file, start)
    return tensors


def _header_bytes(file: StoredFile) -> bytes:
    if file.size < 8:
        raise CheckpointError(f"{file.name} is truncated: {file.size} bytes are no safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file.name} is not a safetensors file: its header would take {length} bytes")
    if 8 + length > file.size:
        raise CheckpointError(f"{file.name} is truncated: the header ends at byte {8 + length} of {file.size}")
    return file.read(8, length)


def _tensor(name: str, entry: Any, file: StoredFile, start: int) -> StoredTensor:
    where = f"{file.name}: tensor {name}"
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise CheckpointError(f"{where}: the header entry needs dtype, shape and data_offsets")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {dtype_name!r}")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if end - begin != expected:
        raise CheckpointError(f"{where}: {end - begin} bytes stored, shape {shape} of {dtype_name} needs {expected}")
    if start + end > file.size:
        raise CheckpointError(f"{file.name} is truncated: tensor {name} ends at byte {start + end} of {file.size}")
    return StoredTensor(name, file, start + begin, dtype, torch.Size(shape))


def _check_layout(tensors: dict[str, StoredTensor], file: StoredFile, start: int) -> None:
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = start
    for before, after in pairwise([None, *ordered]):
        assert after is not None
        if after.offset != position:
            what = f"overlaps {before.name}" if before and after.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{file.name}: tensor {after.name} {what}")
        position += after.nbytes
    if position != file.size:
        raise CheckpointError(f"{file.name} has {file.size - position} bytes that belong to no tensor")


def _unique(pairs: list[tuple[str, Any]], file: StoredFile) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise CheckpointError(f"{file.name}: the safetensors header names something twice")
    return names
