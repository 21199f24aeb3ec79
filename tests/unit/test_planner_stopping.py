"""A plan that nobody wants any more is given up wherever it is, and what it left is as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tensor_parallel.checkpoint import open_source
from tensor_parallel.errors import LoadCancelled
from tensor_parallel.group import Group
from tensor_parallel.planner import Plan, make_plan
from tensor_parallel.planner.stopping import pausing, stoppable
from tensor_parallel.serving import load_model
from tests import checkpoints


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


class Branching(Plain):
    """Is traced again for each way that its inputs may decide."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.eq(0).any():
            ids = ids + 1
        return super().forward(ids)


class Untraceable(Plain):
    """Branches on what its weights computed: its own code runs."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = super().forward(ids)
        return hidden * 2 if hidden.sum() > 0 else hidden


MODELS = (Plain, Branching, Untraceable)
IDS = torch.arange(6).view(2, 3) + 1


class Patience:
    """Raises at the ``last`` time it is asked."""

    def __init__(self, last: int = 0) -> None:
        self.asked, self.last = 0, last

    def __call__(self) -> None:
        self.asked += 1
        if self.asked == self.last:
            raise LoadCancelled("enough")


class Impatience(Patience):
    """As a load that was cancelled does: raises ever after."""

    def __call__(self) -> None:
        self.asked += 1
        if self.asked >= self.last:
            raise LoadCancelled("enough")


def planned(model: nn.Module, check: Callable[[], None]) -> Plan:
    with stoppable(check):
        return make_plan(model, {"ids": IDS}, 2)


@pytest.mark.parametrize("kind", MODELS)
def test_a_plan_is_the_same_whether_it_could_be_stopped_or_not(kind: type[nn.Module]) -> None:
    asked = Patience()
    assert planned(kind(), asked).digest() == make_plan(kind(), {"ids": IDS}, 2).digest()
    assert asked.asked > 20


@pytest.mark.parametrize("kind", MODELS)
def test_it_stops_wherever_it_is_asked(kind: type[nn.Module]) -> None:
    asked = Patience()
    model = kind()
    digest = planned(model, asked).digest()
    for tenth in range(11):
        last = max(1, asked.asked * tenth // 10)
        check = Impatience(last)
        with pytest.raises(LoadCancelled):
            planned(model, check)
        assert check.asked <= last + 3  # no other way is tried, and nothing falls back
    assert planned(model, Patience()).digest() == digest
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_trace_stops_between_modules() -> None:
    """Before the model's second layer, at the first of many times that it is traced."""
    model, seen = Plain(), []

    def note(*_: object) -> None:
        seen.append(1)

    model.layers[1].register_forward_pre_hook(note)

    def check() -> None:
        if seen:
            raise LoadCancelled("enough")

    with pytest.raises(LoadCancelled):
        planned(model, check)
    assert len(seen) == 1


def test_nothing_is_hooked_where_nothing_can_stop() -> None:
    model = Plain()
    with pausing(model):
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_load_stops_wherever_it_is_asked(tmp_path: Path) -> None:
    source = open_source(checkpoints.gpt2(tmp_path / "gpt2"))

    def load(cancelled: Callable[[], bool]) -> None:
        cpu = torch.device("cpu")
        options = {"execution": "compile"}
        load_model(source, world_size=2, rank=0, device=cpu, group=Group(0, 2), cancelled=cancelled, options=options)

    asked: list[int] = []

    def never() -> bool:
        asked.append(1)
        return False

    load(never)
    total = len(asked)
    for tenth in (0, 3, 6, 9, 9.9):
        last, calls = max(1, int(total * tenth / 10)), 0

        def cancelled(last: int = last) -> bool:
            nonlocal calls
            calls += 1
            return calls >= last

        with pytest.raises(LoadCancelled):
            load(cancelled)
