"""Between messages and tensors: dtypes, sizes, bytes (little-endian, row-major). Tensors here live on the CPU."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from math import prod
from mmap import mmap
from typing import TYPE_CHECKING, Any

import torch

from protos.tensor_parallel.v1 import tensor_pb2
from shardd.errors import InvalidRequest

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    Outputs = RepeatedCompositeFieldContainer[tensor_pb2.Tensor]

Buffer = bytes | bytearray | memoryview | mmap

MAX_DIMENSIONS = 64
MOST_KEPT = 64

TORCH_DTYPES: dict[int, torch.dtype] = {
    tensor_pb2.DataType.Value(name.upper()): getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64"),
    )
}
WIRE_DTYPES = {dtype: value for value, dtype in TORCH_DTYPES.items()}

# A message's bytes are read-only, which torch warns about; inputs are never written to.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


def byte_size(tensor: tensor_pb2.Tensor) -> int:
    """Bytes that ``tensor``'s dtype and shape call for. Raises :class:`InvalidRequest` when they make no sense."""
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidRequest(f"input {tensor.name!r} has unknown dtype {tensor.dtype}")
    shape = tensor.shape
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise InvalidRequest(f"input {tensor.name!r} has an impossible shape")
    size = prod(shape) * dtype.itemsize
    if size >= 2**63:
        raise InvalidRequest(f"input {tensor.name!r} is larger than any memory")
    return size


def check_size(tensor: tensor_pb2.Tensor, data: bytes) -> None:
    """Raise :class:`InvalidRequest` unless ``data`` is as long as ``tensor`` calls for."""
    if len(data) != (size := byte_size(tensor)):
        raise InvalidRequest(f"input {tensor.name!r} needs {size} bytes, {len(data)} came")


def decode(tensor: tensor_pb2.Tensor, data: Buffer, offset: int = 0) -> torch.Tensor:
    """A view of ``data`` from byte ``offset`` on, with the dtype and shape that ``tensor`` states.

    ``data`` must not be written to. Raises :class:`InvalidRequest` when it is too short.
    """
    size = byte_size(tensor)
    if size > memoryview(data).nbytes - offset:
        raise InvalidRequest(f"input {tensor.name!r} needs {size} bytes, {memoryview(data).nbytes - offset} came")
    dtype = TORCH_DTYPES[tensor.dtype]
    shape = tuple(tensor.shape)
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:
        raise InvalidRequest(f"input {tensor.name!r} starts at byte {offset}, which is not a multiple of its element")
    return torch.frombuffer(data, dtype=dtype, count=size // dtype.itemsize, offset=offset).view(shape)


def join_parts(tensor: tensor_pb2.Tensor, parts: list[bytes]) -> torch.Tensor:
    """The tensor whose bytes came in ``parts``; each part is let go as soon as it is copied."""
    size = byte_size(tensor)
    came = sum(map(len, parts))
    if came != size:
        raise InvalidRequest(f"input {tensor.name!r} needs {size} bytes, {came} came in parts")
    joined = bytearray(size)
    position = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[position : position + len(part)] = part
        position += len(part)
    return decode(tensor, joined)


def describe(outputs: Outputs, name: str, value: torch.Tensor, data: bytes | None = None) -> tensor_pb2.Tensor:
    """Add ``value`` to ``outputs``, its bytes being ``data`` if they travel so. Raises :class:`InvalidRequest` for a
    dtype that no message can carry."""
    dtype = WIRE_DTYPES.get(value.dtype)
    if dtype is None:
        raise InvalidRequest(f"output {name!r} has dtype {value.dtype}, which cannot be sent")
    return outputs.add(name=name, dtype=dtype, shape=value.shape, data=data)  # type: ignore[arg-type]


def raw(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    if value.numel() == 0:
        return memoryview(b"")
    flat: Any = value.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def copied(value: torch.Tensor) -> bytes:
    """The bytes of a contiguous CPU tensor."""
    return ctypes.string_at(value.data_ptr(), value.nbytes)


class Kept:
    """Small inputs, each in the memory of the last one of the same description: to make a tensor takes longer than to
    copy some bytes. So a value is good until the next of its description comes."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, tuple[int, ...]], tuple[torch.Tensor, bytearray]] = {}

    def value(self, tensor: tensor_pb2.Tensor) -> torch.Tensor:
        """The tensor whose bytes came with it. Raises :class:`InvalidRequest`."""
        data = tensor.data
        key = (tensor.name, tensor.dtype, tuple(tensor.shape))
        known = self._known.get(key)
        if known is None or len(known[1]) != len(data):
            check_size(tensor, data)
            if len(self._known) >= MOST_KEPT:
                self._known.clear()
            memory = bytearray(data)
            known = self._known[key] = decode(tensor, memory), memory
        known[1][:] = data
        return known[0]


def to_host(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, contiguous and on the CPU, their bytes their values; device copies are started together and
    awaited once."""
    hosts: list[Any] = []
    for value in values:
        if not value.is_cpu:
            break
        hosts.append((value.resolve_neg() if value.is_neg() else value).contiguous())
    else:
        return hosts
    hosts = []
    for value in values:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        hosts.append(host.copy_(value.detach(), non_blocking=True))
    for device in {value.device for value in values if value.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return hosts
