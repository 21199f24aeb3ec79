"""Factories for the tests of `shardctl up`: what goes in comes out, in every element type."""

from __future__ import annotations

import torch
from torch import nn


class Echo(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"same": x.clone(), "twice": torch.cat([x, x])}


def echo(dtype: str = "float32") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Echo(), {"x": torch.zeros(2, 3, dtype=getattr(torch, dtype))}
