"""Models that write in place, planned for two ranks: the values and the gradients of the model itself."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks


class _Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 12))
        self.out = nn.Linear(12, 6)


class Compared(_Writes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.mlp(x).abs()
        mask.gt_(0.05)
        return self.out(x) * (mask[:, 0] + mask[:, 1] + mask[:, 2]).sum(-1)[:, None, None]


class Squeezed(_Writes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.mlp(x).unsqueeze(1)
        z.squeeze_(1)
        return self.out(z)


class Dropped(_Writes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.mlp(x)
        r = functional.dropout(h, 0.3, self.training)  # h itself where nothing is dropped
        r += x
        return self.out(r) + self.out(h)


class Assigned(_Writes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.mlp(x)
        turned = torch.empty_like(q)
        turned[..., :6] = -q[..., 6:]
        turned[..., 6:] = q[..., :6]
        return self.out(q + turned)


def _wrapped(model: nn.Module, x: torch.Tensor, group: Group, tracing: threading.Lock) -> DistributedModelWrapper:
    with tracing:  # one thread at a time may trace
        return DistributedModelWrapper(copy.deepcopy(model), 2, group.rank, {"x": x}, group=group)


@pytest.mark.parametrize("kind", [Compared, Squeezed, Dropped, Assigned])
def test_values_are_the_models(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x, tracing = kind().eval(), torch.randn(2, 5, 12), threading.Lock()

    def body(group: Group) -> Any:
        wrapped = _wrapped(model, x, group, tracing)
        with torch.no_grad():
            return wrapped.plan.mode, wrapped(x=x)

    with torch.no_grad():
        wanted = model(x)
    for mode, got in run_ranks(2, body):
        assert mode == "graph"
        assert_close(got, wanted)


def test_what_is_assigned_to_slices_has_gradients() -> None:
    torch.manual_seed(0)
    model, x, tracing = Assigned(), torch.randn(2, 5, 12), threading.Lock()
    alone = copy.deepcopy(model)
    alone(x).square().sum().backward()

    def body(group: Group) -> Any:
        wrapped = _wrapped(model, x, group, tracing)
        wrapped.train()
        given = x.clone().requires_grad_()
        wrapped(x=given).square().sum().backward()
        return given.grad

    given = x.clone().requires_grad_()
    alone(given).square().sum().backward()
    for got in run_ranks(2, body):
        assert_close(got, given.grad)


class Remembers(_Writes):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 5, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(x + self.last)
        self.last.copy_(x)
        return self.out(y)


def test_an_input_that_became_a_state_is_its_callers_to_use_again() -> None:
    torch.manual_seed(0)
    model, example, tracing = Remembers().eval(), torch.randn(2, 5, 12), threading.Lock()

    def both(forward: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = example.clone()
        with torch.no_grad():
            first = forward(x=x)
            return first, forward(x=x.mul_(-3))

    def body(group: Group) -> Any:
        return both(_wrapped(model, example, group, tracing))

    results = run_ranks(2, body)
    for got in results:
        assert_close(got, both(copy.deepcopy(model)))
