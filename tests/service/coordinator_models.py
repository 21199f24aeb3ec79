"""Model factories whose shapes are what the coordinator is tested with."""

from __future__ import annotations

import torch
from torch import nn


class TimeFirst(nn.Module):
    """Its leading dimension is time: each step's output depends on all steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(x))
        return self.down(hidden - hidden.mean(dim=0, keepdim=True))


class Head(nn.Module):
    """Ids in, scores over a vocabulary out: the embedding and the output stay sharded by vocabulary."""

    def __init__(self, vocabulary: int = 101, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(vocabulary, width)
        self.score = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.score(torch.relu(self.embed(ids)))


Made = tuple[nn.Module, dict[str, torch.Tensor]]


def time_first() -> Made:
    return TimeFirst(), {"x": torch.zeros(3, 16)}


def head() -> Made:
    return Head(), {"ids": torch.zeros(2, 5, dtype=torch.int64)}
