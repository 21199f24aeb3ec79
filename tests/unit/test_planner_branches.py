"""Models that look at their inputs' values: a program for each way they decide, where inputs alone decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.planner import instantiate, make_plan
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks

WIDTH = 16


class Masked(nn.Module):
    """Leaves padding out where there is any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        shifted = torch.zeros_like(ids)
        shifted[:, 1:] = ids[:, :-1]
        padding = shifted.eq(1)
        hidden = self.embed(ids)
        if padding.any():
            hidden = hidden.masked_fill(padding[..., None], 0.5)
        return self.down(torch.relu(self.up(hidden)))


PLAIN = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
PADDED = torch.tensor([[2, 3, 1, 5, 4], [6, 7, 8, 9, 3], [1, 2, 3, 4, 5]])
AT_THE_END = torch.tensor([[2, 3, 4, 1]])  # shifted out of sight


@pytest.mark.parametrize("example", [PLAIN, PADDED])
def test_each_way_is_a_graph_planned_when_first_taken(example: Tensor) -> None:
    model = Masked()
    plan = make_plan(model, {"ids": example}, 2)
    assert (plan.mode, plan.verified) == ("graph", "whole model"), plan.notes
    assert (plan.summary()["all_reduces"], plan.summary()["all_gathers"]) == (2, 0)
    wrappers = [DistributedModelWrapper(model, 2, rank, {"ids": example}, group=Group(rank, 2)) for rank in range(2)]
    for wrapper in wrappers:  # here, since one thread at a time may trace
        for ids in (PLAIN, PADDED):
            wrapper._inner[0].runner_for((), {"ids": ids})
        assert len(next(iter(wrapper._inner[0]._runners.values()))) == 2

    def body(group: Group) -> Any:
        wrapper = wrappers[group.rank]
        wrapper._group.bind(group.backend)
        with torch.no_grad():
            return [wrapper(ids=ids) for ids in (PLAIN, PADDED, AT_THE_END, PLAIN)]

    for results in run_ranks(2, body):
        for ids, got in zip((PLAIN, PADDED, AT_THE_END, PLAIN), results, strict=True):
            assert_close(got, model(ids).detach(), rtol=1e-4, atol=1e-5)
    for wrapper in wrappers:
        assert len(next(iter(wrapper._inner[0]._runners.values()))) == 2


class Twice(Masked):
    """A second branch, on either way of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = super().forward(ids)
        if ids.gt(8).all():
            hidden = hidden * 2
        return self.head(hidden)


def test_all_ways_can_be_planned_ahead_and_give_outputs_alike() -> None:
    model = Twice()
    plan = make_plan(model, {"ids": PLAIN}, 2, gather_outputs=False)
    assert plan.mode == "graph", plan.notes
    assert all(output.shard is None or output.shard.dim is None for output in plan.outputs)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    modules = [
        instantiate(
            plan,
            model,
            rank=rank,
            group=Group(rank, 2),
            read=lambda name, shard, rank=rank: shard.take(state[name], rank),
        ).eval()
        for rank in range(2)
    ]
    cases = (PLAIN, PADDED, PADDED + 8, PADDED.clamp_min(9), torch.full((1, 3), 9))
    for module in modules:
        assert module.plan_branches() == 3
        module._planner = None  # nothing is planned later

    def body(group: Group) -> Any:
        module = modules[group.rank]
        module._group.bind(group.backend)
        with torch.inference_mode():
            return [module(ids=ids) for ids in cases]

    for results in run_ranks(2, body):
        for ids, got in zip(cases, results, strict=True):
            assert_close(got, model(ids).detach(), rtol=1e-4, atol=1e-5)


class Within(Masked):
    """A branch on one way of another only."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if ids.eq(1).any():
            hidden = hidden * 0.5
            if ids.eq(1).all(1).any():
                hidden = hidden + 1
        return self.down(torch.relu(self.up(hidden)))


def test_branches_met_only_on_another_way_are_planned_ahead_too() -> None:
    model = Within()
    plan = make_plan(model, {"ids": PLAIN}, 1)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    module = instantiate(plan, model, rank=0, group=Group(0, 1), read=lambda name, shard: state[name]).eval()
    assert module.plan_branches() == 2
    module._planner = None
    for ids in (PLAIN, PADDED, torch.ones(2, 3, dtype=torch.int64)):
        assert_close(module(ids=ids).detach(), model(ids).detach(), rtol=1e-4, atol=1e-5)


class Clash(Masked):
    """Each way can be gone, but not both."""

    def forward(self, ids: Tensor) -> Tensor:
        padded, long = ids.eq(1).any(), ids.gt(30).any()
        hidden = self.embed(ids)
        found = 0
        if padded:
            hidden, found = hidden * 0.5, found + 1
        if long:
            hidden, found = hidden + 1, found + 1
        if found == 2:
            raise ValueError("one or the other")
        return self.down(torch.relu(self.up(hidden)))


class Untraceable(Masked):
    """One way is fine, the other is not."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = super().forward(ids)
        if ids.eq(1).any() and float(hidden.sum()) > 0:
            return hidden * 2
        return hidden


class Computed(Masked):
    """Decides by what weights computed."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = super().forward(ids)
        return hidden * 2 if (hidden > 0).any() else hidden


class Random(Masked):
    """Decides by chance."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = super().forward(ids)
        return hidden * 2 if torch.rand_like(ids.float()).gt(0.5).any() else hidden


@pytest.mark.parametrize("build", [Untraceable, Computed, Random, Clash])
def test_other_decisions_are_left_to_the_models_own_code(build: Any) -> None:
    assert make_plan(build(), {"ids": PLAIN}, 2).mode == "modules"


def test_a_combination_that_cannot_be_traced_keeps_the_models_own_code() -> None:
    class Two(Masked):
        def forward(self, ids: Tensor) -> Tensor:
            hidden, ways = self.embed(ids), 0
            for condition in (ids.eq(1).any(), ids.gt(8).any()):
                ways += bool(condition)
            if ways == 2 and float(hidden.sum()) > 0:
                hidden = hidden * 2
            return self.down(torch.relu(self.up(hidden)))

    assert make_plan(Two(), {"ids": PLAIN.clamp_max(8)}, 2).mode == "modules"


def test_conditions_after_one_that_does_not_hold_are_not_computed() -> None:
    """They may be impossible for such inputs."""

    class Looking(Masked):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embed(ids)
            if ids.lt(4).all() and torch.where(ids < 4, ids, ids).gather(1, ids).eq(1).any():
                hidden = hidden * 2
            return self.down(torch.relu(self.up(hidden)))

    model = Looking()
    plan = make_plan(model, {"ids": torch.tensor([[3, 1, 2, 3], [3, 2, 2, 3]])}, 2)
    assert plan.mode == "graph", plan.notes
    assert len(plan.artifact.signature.branches.decisions) == 2
    assert not plan.artifact.signature.branches.hold([PLAIN])


def test_whole_quotients_of_sizes_are_sizes() -> None:
    class Chunked(Masked):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = super().forward(ids[:, : 2 * torch.div(ids.shape[1], 2, rounding_mode="trunc")])
            chunks = torch.div(hidden.shape[1], 2, rounding_mode="trunc")
            return hidden.view(hidden.shape[0], chunks, 2, WIDTH).sum(2)

    plan = make_plan(Chunked(), {"ids": PLAIN}, 2)
    assert plan.mode == "graph", plan.notes
