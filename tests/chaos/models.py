"""The model under test: small, deterministic, and slow enough that requests are in flight when a fault strikes."""

from __future__ import annotations

import sys
import time

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


class Sleeper(nn.Module):
    """Takes its time, whatever the processor is busy with."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seconds = seconds
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) > 0:  # what depends on a value cannot be traced: the layers are sharded one by one
            time.sleep(self.seconds)
        return self.layer(x)


def sleeper(seconds: float = 0.05) -> tuple[nn.Module, dict[str, Tensor]]:
    return Sleeper(seconds).eval(), {"x": torch.zeros(2, 8)}


class Greedy(DeepMlp):
    """Takes memory as it is told, on the last rank only: a request whose activations do not fit there."""

    def forward(self, x: Tensor) -> Tensor:
        wanted = int(x[0, 0])
        if wanted > 0 and argument("--rank") == argument("--world-size") - 1:
            torch.empty(wanted << 40, dtype=torch.uint8)
        return self.body(x)


def argument(flag: str) -> int:
    """Of the daemon that this runs in."""
    return int(sys.argv[sys.argv.index(flag) + 1])


def greedy() -> tuple[nn.Module, dict[str, Tensor]]:
    """``x[0, 0]`` is the number of TiB wanted."""
    torch.manual_seed(7)
    blocks: list[nn.Module] = [nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH)]
    return Greedy(blocks).eval(), {"x": torch.zeros(2, WIDTH)}
