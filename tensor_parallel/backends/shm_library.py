"""The compiled part of the shared-memory backend, if it was built for this machine."""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache
from pathlib import Path

from torch import bfloat16, dtype, float16, float32, float64, int8, int16, int32, int64, uint8, uint16, uint32, uint64

_LOG = logging.getLogger("tensor_parallel")
MAX_RANKS = 128

# The order of `enum dtype` in _shm.c; signed and unsigned integers wrap alike.
DTYPE_CODES: dict[dtype, int] = {
    **dict.fromkeys((uint8, int8), 0),
    **dict.fromkeys((uint16, int16), 1),
    **dict.fromkeys((uint32, int32), 2),
    **dict.fromkeys((uint64, int64), 3),
    float16: 4,
    bfloat16: 5,
    float32: 6,
    float64: 7,
}

_POINTER = ctypes.c_void_p
_U64 = ctypes.c_uint64
_INT = ctypes.c_int
_SIGNATURES = {
    "tp_region_bytes": (_U64, [_INT, _U64]),
    "tp_open": (_POINTER, [_INT, _INT, _INT, _U64, _POINTER, ctypes.c_double, _INT]),
    "tp_close": (None, [_POINTER]),
    "tp_abort": (None, [_POINTER, ctypes.c_char_p]),
    "tp_failure": (_INT, [_POINTER]),
    "tp_reason": (ctypes.c_char_p, [_POINTER]),
    "tp_all_reduce": (_INT, [_POINTER, _POINTER, _U64, _INT, _U64]),
    "tp_all_gather": (_INT, [_POINTER, _POINTER, _POINTER, _U64, _POINTER]),
    "tp_reduce_scatter": (_INT, [_POINTER, _POINTER, _POINTER, _U64, _POINTER, _INT]),
    "tp_broadcast": (_INT, [_POINTER, _POINTER, _U64, _INT]),
    "tp_barrier": (_INT, [_POINTER]),
}


@cache
def load_library() -> ctypes.CDLL | None:
    """The library, or None where it was not built. Calls release the interpreter lock."""
    if sys.platform != "linux":
        return None
    for path in sorted(Path(__file__).parent.glob("_shm*.so")):
        try:
            return _declared(ctypes.CDLL(str(path), use_errno=True))
        except (OSError, AttributeError) as error:  # built for another machine, or from another version's source
            _LOG.warning("cannot use %s, building the package again would help: %s", path.name, error)
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
