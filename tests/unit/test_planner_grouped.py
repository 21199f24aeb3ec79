"""Convolutions in groups keep whole groups on each rank; the search may have their result whole by one gather."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from tensor_parallel.planner import make, search, simulate
from tensor_parallel.planner.cost import Network
from tensor_parallel.planner.export import trace
from tensor_parallel.planner.reserve import reserved
from tensor_parallel.planner.tensors import Tensors

WIDTH, GROUPS = 24, 4


class Block(nn.Module):
    """A residual block of two convolutions by group, normalised over all channels afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(WIDTH, 2 * WIDTH, 1, groups=GROUPS)
        self.down = nn.Conv1d(2 * WIDTH, WIDTH, 1, groups=GROUPS)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        return self.norm((y + self.down(functional.gelu(self.up(y)))).transpose(1, 2))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_result_of_divided_groups_is_gathered_where_asked(ranks: int):
    """On three ranks the four groups are uneven."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    twin = make.as_skeleton(model)
    with reserved(twin):
        traced = trace(twin, (x,), {})
    modes = {"0.down.weight": "gather", "1.down.weight": "gather"}
    found = search.evaluate(traced, Tensors(twin), ranks, Network(), modes, gather_outputs=True)
    assert Counter(c.kind for c in found.communications) == {"all_gather": 2}
    for c in found.communications:
        assert c.origin & modes.keys()  # so that the search thinks of gathering there
    state = dict(model.named_parameters())

    def part(name: str, rank: int) -> Tensor:
        if name not in found.divisions:
            return state[name].detach()
        dim, owner = found.divisions[name]
        return state[name].detach().index_select(dim, (torch.tensor(owner) == rank).nonzero().flatten())

    assert found.divisions["0.up.weight"][0] == found.divisions["1.down.weight"][0] == 0
    with torch.no_grad():
        want = model(x)
        for outputs in simulate.run(found.prover.program, [x], part, {}):
            assert_close(outputs[0], want)
