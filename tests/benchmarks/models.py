"""The models that benchmarks serve; daemons build them by name (``--allow-factory tests.benchmarks.models:mlp``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Blocks of Linear - ReLU - Linear, one after the other."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[m for _ in range(layers) for m in (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def mlp(width: int = 1024, hidden: int = 4096, layers: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and an example of what it takes."""
    torch.manual_seed(0)
    return Mlp(width, hidden, layers).eval(), {"x": torch.zeros(2, width)}


class Identity(nn.Module):
    """Gives back what it gets: the cost of the service alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0


def identity(width: int = 1024) -> tuple[nn.Module, dict[str, Tensor]]:
    return Identity().eval(), {"x": torch.zeros(2, width)}
