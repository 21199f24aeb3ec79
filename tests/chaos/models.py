"""The model under test: small, deterministic, and slow enough that requests are in flight when a fault strikes."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 128


def deep_mlp(layers: int = 8, hidden: int = 512) -> nn.Module:
    torch.manual_seed(7)
    blocks = [m for _ in range(layers) for m in (nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))]
    return nn.Sequential(*blocks).eval()
