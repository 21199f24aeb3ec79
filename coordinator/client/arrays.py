"""Arrays to wire tensors and back: numpy always, torch tensors where the caller uses torch. Never imports torch.

bfloat16 and the float8 types have no numpy type of their own; `ml_dtypes` adds them and is imported only when an output
has one.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from coordinator.client.errors import InvalidInputError, RequestError
from coordinator.dtypes import DataType, from_numpy, from_torch_name
from protos.tensor_parallel.v1 import tensor_pb2

_SUPPORTED = ", ".join(dtype.torch_name for dtype in DataType)

Buffer = memoryview | bytes


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as it travels: little-endian row-major bytes, not copied where the array already has that layout."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    data: memoryview
    shared: tensor_pb2.SharedMemoryRef | None = None  # then ``data`` is empty


Locate = Callable[[npt.NDArray[Any]], tensor_pb2.SharedMemoryRef | None]


def to_wire(inputs: Mapping[str, Any], locate: Locate = lambda _: None) -> tuple[list[WireTensor], bool]:
    """The tensors of ``inputs``, and whether any was a torch tensor (then outputs are to be, too).

    ``locate`` tells where in shared memory an array lies, if it does.

    Raises InvalidInputError for what has no element type on the wire (objects, strings, complex numbers).
    """
    if not isinstance(inputs, Mapping):
        raise InvalidInputError(f"inputs is a {type(inputs).__name__}; give a mapping of input names to arrays")
    torch = sys.modules.get("torch")
    tensors, any_torch = [], False
    for name, value in inputs.items():
        if not isinstance(name, str):
            raise InvalidInputError(f"input name {name!r} is not a string")
        if torch is not None and isinstance(value, torch.Tensor):
            any_torch = True
            tensors.append(_from_torch(name, value, torch))
        else:
            tensors.append(_from_numpy(name, value, locate))
    return tensors, any_torch


def _from_numpy(name: str, value: object, locate: Locate) -> WireTensor:
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged lists
        raise InvalidInputError(f"input {name!r} is not an array: {error}") from None
    try:
        dtype = from_numpy(array.dtype)
    except KeyError:
        raise InvalidInputError(
            f"input {name!r} has element type {array.dtype.name}, which tensors cannot have; "
            f"convert it to one of {_SUPPORTED}"
        ) from None
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    shared = locate(array)
    return WireTensor(name, dtype, array.shape, memoryview(b"") if shared else _bytes_of(array), shared)


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    # As uint8: ml_dtypes' types have no buffer format, and memoryview.cast refuses arrays with a zero in the shape.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _from_torch(name: str, value: Any, torch: ModuleType) -> WireTensor:
    try:
        dtype = from_torch_name(str(value.dtype))
    except KeyError:
        raise InvalidInputError(f"input {name!r} has element type {value.dtype}, which tensors cannot have") from None
    flat = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    return WireTensor(name, dtype, tuple(value.shape), memoryview(flat.view(torch.uint8).numpy()))


def from_wire(dtype: int, shape: Sequence[int], data: Buffer | bytearray, *, as_torch: bool) -> Any:
    """An array over ``data`` without a copy (read-only if ``data`` is), or a torch tensor with memory of its own.

    Raises RequestError: INTERNAL when the byte count and the shape disagree, UNIMPLEMENTED for an element type that
    this client or numpy cannot hold.
    """
    expected = byte_size(dtype, shape)
    if expected != len(data):
        raise RequestError(
            grpc.StatusCode.INTERNAL, f"an output of shape {tuple(shape)} came with {len(data)} bytes, not {expected}"
        )
    kind = DataType(dtype)
    if not as_torch:
        return np.ndarray(tuple(shape), numpy_dtype(kind), data)
    torch = sys.modules["torch"]
    # torch has no read-only tensors, so this one copy cannot be saved.
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if expected else torch.empty(0, dtype=torch.uint8)
    return raw.view(getattr(torch, kind.torch_name)).reshape(tuple(shape))


def byte_size(dtype: int, shape: Sequence[int]) -> int:
    """Raises RequestError (UNIMPLEMENTED) for an element type that this client does not know."""
    try:
        return math.prod(shape) * DataType(dtype).size
    except ValueError:
        raise RequestError(
            grpc.StatusCode.UNIMPLEMENTED, f"the server sent element type {dtype}; update this client"
        ) from None


@functools.cache
def numpy_dtype(kind: DataType) -> np.dtype[Any]:
    """Raises RequestError (UNIMPLEMENTED) where numpy needs `ml_dtypes` for it, which is not installed."""
    if kind.numpy_dtype is not None:
        return kind.numpy_dtype
    try:
        ml_dtypes = importlib.import_module("ml_dtypes")
    except ImportError:
        raise RequestError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"an output is {kind.torch_name}, which numpy cannot hold by itself: pip install ml_dtypes, "
            f"or pass torch tensors",
        ) from None
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, kind.torch_name))
    return dtype
