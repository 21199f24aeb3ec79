"""The model's stored tensors: names, sizes, and which names are one tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import nn


def differentiable(dtype: torch.dtype) -> bool:
    """Whether tensors of this type may have gradients."""
    return dtype.is_floating_point or dtype.is_complex


@dataclass(frozen=True)
class Stored:
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    persistent: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def role(name: str) -> str:
    """What a tensor is, whichever layer it is in: its name without numbers."""
    return re.sub(r"\d+", "*", name)


class Tensors:
    """Every parameter and buffer by its first name, and every further name it has (tied weights)."""

    def __init__(self, model: nn.Module) -> None:
        self.stored: dict[str, Stored] = {}
        self.tied: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._add(first, name, parameter, True, True)
        for prefix, module in model.named_modules(remove_duplicate=False):
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    self._add(first, name, buffer, False, leaf not in module._non_persistent_buffers_set)
        self.total_bytes = sum(s.nbytes for s in self.stored.values())

    def _add(
        self, first: dict[int, str], name: str, tensor: torch.Tensor, is_parameter: bool, persistent: bool
    ) -> None:
        known = first.setdefault(id(tensor), name)
        if known == name:
            self.stored[name] = Stored(tuple(tensor.shape), tensor.dtype, is_parameter, persistent)
        else:
            self.tied[name] = known

    def canonical(self, name: str) -> str:
        return self.tied.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[self.canonical(name)].shape

    def nbytes(self, name: str) -> int:
        return self.stored[self.canonical(name)].nbytes
