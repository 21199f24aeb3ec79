"""What a caller may ask of a load, checked: a plain mapping (from JSON) becomes a frozen value, and anything
unknown is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensor_parallel.errors import InvalidInput

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
)
}  # fmt: skip

_EXAMPLE_SIZES = (2, 16, 24, 32)  # of the first, second, ... dimension where it is free


@dataclass(frozen=True)
class InputOption:
    """One input as the user describes it: a free dimension is ``None`` (``null`` or -1 in JSON); ``high`` is
    exclusive.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    low: int = 0
    high: int | None = None

    @classmethod
    def parse(cls, entry: Any) -> InputOption:
        """From a mapping with ``name``, ``dtype``, ``shape`` and optionally ``low`` and ``high``. Raises
        :class:`InvalidInput`.
        """
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise InvalidInput("an input spec is an object with name, dtype and shape")
        name = entry["name"]
        if unknown := set(entry) - {"name", "dtype", "shape", "low", "high"}:
            raise InvalidInput(f"input spec {name}: unknown field {', '.join(sorted(map(str, unknown)))}")
        if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
            raise InvalidInput(f"input spec {name}: dtype must be one of {', '.join(DTYPES)}")
        shape = entry.get("shape")
        if not isinstance(shape, Sequence) or isinstance(shape, str) or not all(_is_size(size) for size in shape):
            raise InvalidInput(f"input spec {name}: shape must be a list of sizes, null or -1 for a free dimension")
        low, high = entry.get("low", 0), entry.get("high")
        if type(low) is not int or not (high is None or (type(high) is int and high > low)):
            raise InvalidInput(f"input spec {name}: low and high must be integers with low < high")
        return cls(name, DTYPES[entry["dtype"]], tuple(None if s in (None, -1) else int(s) for s in shape), low, high)

    def example(self, seed: int = 0) -> Tensor:
        """A small tensor of this description, the same at every call."""
        usual = (*_EXAMPLE_SIZES, *[8] * len(self.shape))  # by position: inputs that share a dimension agree on it
        shape = [usual[dim] if size is None else size for dim, size in enumerate(self.shape)]
        return random_input(shape, self.dtype, self.low, self.high, seed)


@dataclass(frozen=True)
class SourceOptions:
    """Options of every kind of source. ``dtype``: of the weights, ``None`` for the checkpoint's own.

    ``task`` and ``architecture`` choose a Hugging Face class; ``attention`` its kernel (``sdpa`` or ``eager``).
    ``inputs`` replaces the inferred inputs; ``input_names`` keeps only some of them. ``kwargs`` and ``weights`` go
    to a factory.
    """

    dtype: torch.dtype | None = None
    task: str | None = None
    architecture: str | None = None
    attention: str | None = None
    inputs: tuple[InputOption, ...] = ()
    input_names: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    factories: tuple[str, ...] = ()
    """Factories the operator allows: exact ``package.module:factory``, or a prefix ending in ``*``. Never from a
    request.
    """

    @classmethod
    def parse(cls, options: Mapping[str, Any], factories: Sequence[str] = ()) -> SourceOptions:
        """From a request's options. Raises :class:`InvalidInput` naming the option that is unknown or malformed."""
        texts = {}
        for name in ("task", "architecture", "attention", "weights"):
            value = options.get(name)
            if not (value is None or isinstance(value, str)):
                raise InvalidInput(f"option {name} must be a string")
            texts[name] = value or None
        known = {"dtype", "inputs", "kwargs", *texts}
        if unknown := sorted(map(str, set(options) - known)):
            raise InvalidInput(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        inputs, names = _parse_inputs(options.get("inputs", ()))
        kwargs = options.get("kwargs", {})
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise InvalidInput("option kwargs must be an object")
        dtype = _parse_dtype(options.get("dtype"))
        return cls(dtype, inputs=inputs, input_names=names, kwargs=dict(kwargs), factories=tuple(factories), **texts)


def random_input(
    shape: Sequence[int], dtype: torch.dtype, low: int = 0, high: int | None = None, seed: int = 0
) -> Tensor:
    """Values to plan with: normal for floats, below ``high`` (2 if not given) for integers; does not touch the
    global seed.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    if dtype.is_floating_point:
        return torch.randn(list(shape), generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.ones(list(shape), dtype=torch.bool)
    return torch.randint(low, low + 2 if high is None else high, list(shape), generator=generator).to(dtype)


def _parse_dtype(value: Any) -> torch.dtype | None:
    if value in (None, "", "auto"):
        return None
    dtype = DTYPES.get(value) if isinstance(value, str) else None
    if dtype is None or not dtype.is_floating_point or dtype.itemsize == 1:
        raise InvalidInput("option dtype must be auto, float64, float32, float16 or bfloat16")
    return dtype


def _parse_inputs(value: Any) -> tuple[tuple[InputOption, ...], tuple[str, ...]]:
    """Either full specs, or names of inferred inputs to keep."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidInput("option inputs must be a list")
    if value and all(isinstance(entry, str) for entry in value):
        return (), tuple(value)
    specs = tuple(InputOption.parse(entry) for entry in value)
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise InvalidInput("option inputs names an input twice")
    return specs, ()


def _is_size(size: Any) -> bool:
    return size is None or (type(size) is int and (size >= 0 or size == -1))
