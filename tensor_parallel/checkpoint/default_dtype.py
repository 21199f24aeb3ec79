"""A default dtype for one thread.

``torch.set_default_dtype`` holds for the whole process: building a bfloat16 model in a daemon's loading thread
would change what the models it serves meanwhile compute, wherever their code makes a tensor without saying of what
dtype. A function mode, by contrast, belongs to its thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Made of the default dtype whatever their arguments are; and where one of the arguments is a Python float.
_FLOAT = frozenset({
    torch.empty, torch.empty_strided, torch.empty_permuted, torch.zeros, torch.ones, torch.rand, torch.randn,
    torch.eye, torch.linspace, torch.logspace, torch.bartlett_window, torch.blackman_window, torch.hamming_window,
    torch.hann_window, torch.kaiser_window,
})  # fmt: skip
_BY_ARGUMENT = frozenset({
    torch.arange, torch.range, torch.full, torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.normal,
})  # fmt: skip

_patching = threading.Lock()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it, in this thread only, tensors that would have torch's default dtype are made in ``dtype``.

    One thread at a time: others that want it wait.
    """
    if dtype == torch.get_default_dtype():
        yield
        return
    original, thread = torch.get_default_dtype, threading.get_ident()

    def asked() -> torch.dtype:  # not a function that modes see
        return dtype if threading.get_ident() == thread else original()

    with _patching, _DefaultDtype(dtype):
        torch.get_default_dtype = asked
        try:
            yield
        finally:
            torch.get_default_dtype = original


class _DefaultDtype(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if given.get("dtype") is None and (
            func in _FLOAT or (func in _BY_ARGUMENT and _holds_float([*args, *given.values()]))
        ):
            given["dtype"] = self._dtype
        return func(*args, **given)


def _holds_float(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_float(item) for item in value)
    return isinstance(value, float)
