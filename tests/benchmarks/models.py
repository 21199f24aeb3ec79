"""The models that benchmarks serve; daemons build them by name (``--allow-factory tests.benchmarks.models:mlp``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp(width: int = 1024, hidden: int = 4096, layers: int = 1, seed: int = 0) -> nn.Module:
    """``layers`` blocks of Linear(width, hidden) - ReLU - Linear(hidden, width)."""
    torch.manual_seed(seed)
    blocks = [m for _ in range(layers) for m in (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))]
    return nn.Sequential(*blocks).eval()


class Identity(nn.Module):
    """Gives back what it gets: the cost of the service alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0


def identity() -> nn.Module:
    return Identity().eval()
