"""Arrays from and to files: .npy, .npz and .safetensors.

safetensors (a length, a JSON header, raw bytes; https://github.com/huggingface/safetensors) is read here rather than by
its library, which is no part of the base install. Types that numpy lacks come as those of `ml_dtypes`.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from coordinator.cli.failures import USAGE, Failure
from coordinator.client.arrays import numpy_dtype
from coordinator.dtypes import DataType, from_numpy

Arrays = dict[str, npt.NDArray[Any]]
SUFFIXES = (".npy", ".npz", ".safetensors")
_STORED = {
    "F64": DataType.FLOAT64, "F32": DataType.FLOAT32, "F16": DataType.FLOAT16, "BF16": DataType.BFLOAT16,
    "F8_E4M3": DataType.FLOAT8_E4M3FN, "F8_E5M2": DataType.FLOAT8_E5M2,
    "I64": DataType.INT64, "I32": DataType.INT32, "I16": DataType.INT16, "I8": DataType.INT8, "U8": DataType.UINT8,
    "BOOL": DataType.BOOL, "U16": DataType.UINT16, "U32": DataType.UINT32, "U64": DataType.UINT64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _STORED.items()}


def read(path: Path) -> Arrays:
    """Every array of the file by name; that of a .npy is called "". Raises Failure for what cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        # allow_pickle=False: a pickled array runs code when it is read.
        found = np.load(path, allow_pickle=False)
        return {"": found} if isinstance(found, np.ndarray) else dict(found)
    except FileNotFoundError:
        raise Failure(f"no file {str(path)!r}", USAGE) from None
    except (ValueError, KeyError, EOFError) as error:
        raise Failure(f"{path}: {error}", USAGE) from None


def read_npy(stream: BinaryIO) -> npt.NDArray[Any]:
    try:
        found: npt.NDArray[Any] = np.load(io.BytesIO(stream.read()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Failure(f"standard input is no .npy array: {error}", USAGE) from None
    return found


def _read_safetensors(path: Path) -> Arrays:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = numpy_dtype(_STORED[entry["dtype"]])
            arrays[name] = np.frombuffer(data[8 + size + begin : 8 + size + end], dtype).reshape(entry["shape"])
    return arrays


def write(path: Path, arrays: Arrays) -> None:
    """Raises Failure for several arrays in a .npy, and for a suffix that is none of `SUFFIXES`."""
    if path.suffix == ".safetensors":
        _write_safetensors(path, arrays)
    elif path.suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, **{name: _plain(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    elif path.suffix == ".npy":
        if len(arrays) != 1:
            raise Failure(f"{path}: a .npy holds one array and there are {len(arrays)}: {', '.join(arrays)}", USAGE)
        with path.open("wb") as file:
            np.save(file, _plain(next(iter(arrays.values()))))
    else:
        raise Failure(f"--output {str(path)!r} ends in none of {', '.join(SUFFIXES)}", USAGE)


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # numpy's own formats would store bfloat16 as nameless bytes; every such value is exact in float32.
    return array if from_numpy(array.dtype).numpy_dtype is not None else array.astype(np.float32)


def _write_safetensors(path: Path, arrays: Arrays) -> None:
    header, offset = {}, 0
    for name, array in arrays.items():
        entry = {"dtype": _NAMES[from_numpy(array.dtype)], "shape": array.shape}
        header[name] = entry | {"data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_json(arrays: Arrays) -> None:
    json.dump({name: values(array) for name, array in arrays.items()}, sys.stdout)
    print()


def values(array: npt.NDArray[Any]) -> Any:
    """Nested lists of Python numbers; not-a-number and infinities as text, since JSON has none."""
    plain = _plain(array)
    if plain.dtype.kind == "f" and not np.isfinite(plain).all():
        return np.where(np.isfinite(plain), plain.astype(object), plain.astype(str).astype(object)).tolist()
    return plain.tolist()
