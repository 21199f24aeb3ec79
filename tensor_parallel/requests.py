"""Is a request one the model can answer? Decided from recorded facts alone, before any rank starts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tensor_parallel.checkpoint.constraints import Constraints
from tensor_parallel.errors import InvalidInput
from tensor_parallel.planner.plan import FREE, InputSpec

REMEMBERED = 4096
"""Descriptions of requests that were found to be right."""


Form = tuple[tuple[str, torch.dtype, torch.Size, torch.device], ...]
"""All of a request but its values."""


def form_of(inputs: Mapping[str, Tensor]) -> Form:
    return tuple([(name, value.dtype, value.shape, value.device) for name, value in inputs.items()])


class RequestChecker:
    """The inputs of one model: their dtypes, shapes and index bounds, what relates their shapes, and which may be
    left out.

    ``defaults`` maps an input that may be left out to the input whose shape it takes and the value it is then
    filled with.
    """

    def __init__(
        self, specs: Sequence[InputSpec], constraints: Constraints, defaults: Mapping[str, tuple[str, int]]
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._constraints = constraints
        self._defaults = {
            name: rule for name, rule in defaults.items() if name in self._specs and rule[0] in self._specs
        }
        self._bounded = [spec for spec in self._specs.values() if spec.bound is not None]
        self._described: set[Form] = set()

    @property
    def optional(self) -> frozenset[str]:
        """Inputs a request may leave out."""
        return frozenset(self._defaults)

    def check(self, inputs: Mapping[str, Tensor]) -> Form:
        """The request's form. Raises :class:`InvalidInput` naming the first input that is unknown, missing, empty, or
        of a dtype, shape or value that the model does not take. An id outside its table is refused here, since a
        divided table would answer it with zeros.
        """
        described = form_of(inputs)
        if described not in self._described:
            self._check_descriptions(inputs)
            if len(self._described) >= REMEMBERED:
                self._described.clear()
            self._described.add(described)
        for spec in self._bounded:
            if spec.name in inputs:
                _check_bound(spec, inputs[spec.name])
        return described

    def _check_descriptions(self, inputs: Mapping[str, Tensor]) -> None:
        """All but the values."""
        if not inputs:
            raise InvalidInput(f"the request is empty; the model takes {self._listed(self._specs)}")
        if unknown := [name for name in inputs if name not in self._specs]:
            raise InvalidInput(f"unknown input {unknown[0]}; the model takes {self._listed(self._specs)}")
        for name, spec in self._specs.items():
            if name in inputs:
                _check_tensor(spec, inputs[name])
            elif name not in self._defaults or self._defaults[name][0] not in inputs:
                raise InvalidInput(f"input {name} is missing; the model takes {self._listed(self._specs)}")
        self._constraints.check({name: value.shape for name, value in self.complete(inputs).items()})

    def complete(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``inputs`` with the optional ones that were left out filled in, in the model's order."""
        full = {}
        for name, spec in self._specs.items():
            if name in inputs:
                full[name] = inputs[name]
            else:
                like, value = self._defaults[name]
                full[name] = torch.full(inputs[like].shape, value, dtype=spec.dtype, device=inputs[like].device)
        return full

    def _listed(self, names: Mapping[str, InputSpec]) -> str:
        return ", ".join(f"{name} (optional)" if name in self._defaults else name for name in names)


def _check_tensor(spec: InputSpec, value: Tensor) -> None:
    if value.dtype != spec.dtype:
        raise InvalidInput(f"input {spec.name} has dtype {_plain(value.dtype)}, the model takes {_plain(spec.dtype)}")
    if value.ndim != len(spec.shape):
        raise InvalidInput(f"input {spec.name} has shape {tuple(value.shape)}, the model takes {_shape(spec.shape)}")
    if any(want not in (FREE, got) for got, want in zip(value.shape, spec.shape, strict=True)):
        raise InvalidInput(f"input {spec.name} has shape {tuple(value.shape)}, the model takes {_shape(spec.shape)}")
    if value.numel() == 0 and 0 not in spec.shape:
        raise InvalidInput(f"input {spec.name} is empty: it has shape {tuple(value.shape)}")


def _check_bound(spec: InputSpec, value: Tensor) -> None:
    if spec.bound is None or value.numel() == 0:
        return
    low, high = (int(extreme) for extreme in torch.aminmax(value))
    if low < spec.bound[0] or high > spec.bound[1]:
        bad = low if low < spec.bound[0] else high
        raise InvalidInput(f"input {spec.name} holds {bad}, outside {spec.bound[0]} to {spec.bound[1]}")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join("any" if size == FREE else str(size) for size in shape) + "]"
