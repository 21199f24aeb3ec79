"""The model under test: small, deterministic, and slow enough that requests are in flight when a fault strikes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 128


class DeepMlp(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def deep_mlp(layers: int = 8, hidden: int = 512) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and an example of what it takes."""
    torch.manual_seed(7)
    blocks = [m for _ in range(layers) for m in (nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))]
    return DeepMlp(blocks).eval(), {"x": torch.zeros(2, WIDTH)}
