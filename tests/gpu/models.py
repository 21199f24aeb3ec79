"""Factories for daemons under test on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Table(nn.Module):
    """Looks up rows that it computes: no check of the inputs sees that one lies outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.rows = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return self.layer(x) + self.rows.index_select(0, row * 2)


def table() -> tuple[nn.Module, dict[str, Tensor]]:
    return Table().eval(), {"x": torch.zeros(2, 16), "row": torch.zeros(2, dtype=torch.int64)}
