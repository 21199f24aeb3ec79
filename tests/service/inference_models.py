"""The models of the conformance checks, as factories for real daemons: allow with ``--allow-factory``."""

from __future__ import annotations

import time

import torch
from torch import nn


class Simple(nn.Module):
    """Triton's own example model, which takes rows of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(16, dtype=torch.int32))

    def forward(self, INPUT0: torch.Tensor, INPUT1: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"OUTPUT0": INPUT0 + INPUT1 + self.nothing, "OUTPUT1": INPUT0 - INPUT1}


class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Sleepy(nn.Module):
    """Takes ``x[0, 0]`` seconds, and with them a place at the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(max(0.0, float(x[0, 0])))
        return self.layer(x)


def simple() -> nn.Module:
    return Simple()


def identity() -> nn.Module:
    return Identity()


def sleepy() -> nn.Module:
    return Sleepy()
