"""Model factories whose shapes are what the coordinator is tested with."""

from __future__ import annotations

from typing import NamedTuple

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


class Answer(NamedTuple):
    output: torch.Tensor
    total: torch.Tensor


class Paired(Head):
    """Answers with a tuple of a class of its own, which no other process would know by name: its plan stays here."""

    def forward(self, ids: torch.Tensor) -> Answer:
        scores = super().forward(ids)
        return Answer(scores, scores.sum(-1))


Made = tuple[nn.Module, dict[str, torch.Tensor]]


def time_first() -> Made:
    return TimeFirst(), {"x": torch.zeros(3, 16)}


def head() -> Made:
    return Head(), {"ids": torch.zeros(2, 5, dtype=torch.int64)}


def paired() -> Made:
    return Paired(), {"ids": torch.zeros(2, 5, dtype=torch.int64)}
