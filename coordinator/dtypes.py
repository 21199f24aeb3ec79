"""Element types as torch, numpy, the Open Inference Protocol and our own messages call them. Imports no torch."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np


class DataType(IntEnum):
    """The values of ``tensor_parallel.v1.DataType``, so that ``DataType(tensor.dtype)`` and ``int(dtype)`` convert."""

    FLOAT64 = 1
    FLOAT32 = 2
    FLOAT16 = 3
    BFLOAT16 = 4
    FLOAT8_E4M3FN = 5
    FLOAT8_E5M2 = 6
    INT64 = 7
    INT32 = 8
    INT16 = 9
    INT8 = 10
    UINT8 = 11
    BOOL = 12
    UINT16 = 13
    UINT32 = 14
    UINT64 = 15

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return _SIZE[self]

    @property
    def torch_name(self) -> str:
        """The name after ``torch.``, for example ``bfloat16``."""
        return self.name.lower()

    @property
    def inference_name(self) -> str:
        """The name in the Open Inference Protocol; Triton has none for float8, which therefore keeps torch's."""
        return _INFERENCE.get(self, self.name)

    @property
    def numpy_dtype(self) -> np.dtype[Any] | None:
        """Little-endian numpy type; None for bfloat16 and float8, which plain numpy lacks."""
        return None if self in _STORED_AS else np.dtype(self.name.lower()).newbyteorder("<")

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """A numpy type of the same width, for moving elements about without looking at them."""
        stored = _STORED_AS.get(self)
        return np.dtype(stored if stored else self.name.lower()).newbyteorder("<")

    @property
    def is_integer(self) -> bool:
        return self.name.startswith(("INT", "UINT"))


_STORED_AS = {DataType.BFLOAT16: "uint16", DataType.FLOAT8_E4M3FN: "uint8", DataType.FLOAT8_E5M2: "uint8"}
_SIZE = {dtype: np.dtype(_STORED_AS.get(dtype, dtype.name.lower())).itemsize for dtype in DataType}
_INFERENCE = {
    DataType.FLOAT64: "FP64",
    DataType.FLOAT32: "FP32",
    DataType.FLOAT16: "FP16",
    DataType.BFLOAT16: "BF16",
}
_BY_INFERENCE = {dtype.inference_name: dtype for dtype in DataType}
_BY_NUMPY = {dtype.numpy_dtype: dtype for dtype in DataType if dtype.numpy_dtype is not None}
_BY_TORCH = {dtype.torch_name: dtype for dtype in DataType}


def from_torch_name(name: str) -> DataType:
    """``bfloat16`` or ``torch.bfloat16``; raises KeyError on another name."""
    return _BY_TORCH[name.removeprefix("torch.")]


def from_inference_name(name: str) -> DataType:
    """``FP32``, ``INT64``, ...; raises KeyError on another name."""
    return _BY_INFERENCE[name]


def from_numpy(dtype: np.dtype[Any]) -> DataType:
    """Also the types of ``ml_dtypes``, known by their names; raises KeyError on a type that no tensor can have."""
    known = _BY_NUMPY.get(dtype.newbyteorder("<"))
    return known if known is not None else _BY_TORCH[dtype.name]
