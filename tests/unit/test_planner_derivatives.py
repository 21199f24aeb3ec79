"""Gradients are the model's where its values alone do not tell them: regions without gradients, derivatives of its own,
and training that cannot be planned as a graph."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tensor_parallel import Group
from tensor_parallel.planner import make_plan
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks

WIDTH = 12


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mlp(), Mlp()


class Frozen(Two):
    """A target without gradients, and a buffer that follows what has some."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.a(x)
            self.mean.lerp_(target.mean(0), 0.1)
        return self.b(x + target - self.mean) * self.mean


class Decorated(Two):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.features(x)) + x


class Switched(Two):
    """Regions that record gradients, within one that does not, and as a plain call."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            first = self.a(x)
            with torch.enable_grad():
                second = self.b(x)
        with torch.set_grad_enabled(True):
            third = self.b(second + first)
        torch.set_grad_enabled(False)
        fourth = self.a(third)
        torch.set_grad_enabled(True)
        return third + fourth


class Recomputed(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(x)
        return checkpoint(self.a, x, use_reentrant=True) + checkpoint(self.b, x, use_reentrant=False)


def spectral() -> nn.Module:
    """Power iteration writes to buffers, without gradients, that the norm is then computed from."""
    return nn.Sequential(spectral_norm(nn.Linear(WIDTH, 32)), nn.Tanh(), spectral_norm(nn.Linear(32, WIDTH)))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.5 * grad


class Adversarial(Two):
    """A derivative of its own; fused heads in an order of their own, tied weights, and a divided buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.norm = nn.Linear(WIDTH, 64), nn.BatchNorm1d(64)
        self.register_buffer("seen", torch.zeros(64))
        self.b.up.weight = self.a.up.weight

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(Reversal.apply(self.a(x))).view(-1, 3, 4, 3).unbind(1)
        y = self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).flatten(1))
        wide = self.norm(self.wide(x))
        self.seen = self.seen + wide.detach().square().mean(0)
        return self.b(y) + (wide * self.seen) @ self.wide.weight


reverse = Reversal.apply


class Captured(Two):
    """``apply`` was looked up before the model was made, and by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.reverse = Reversal.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.b(reverse(self.a(x))) + self.a(self.reverse(x))


class WrittenAside(Two):
    """Values change, gradients do not know."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.no_grad():
            x.clamp_(-0.2, 0.2)
            x[:, :3].mul_(2)
        return self.b(x)


class Hooked(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_full_backward_hook(lambda module, grads, _: (grads[0] * 0.1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(x))


class Updating(Two):
    """Training writes to parameters, which no graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.b.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for target, source in zip(self.b.parameters(), self.a.parameters(), strict=True):
                    target.mul_(0.9).add_(source, alpha=0.1)
        return functional.mse_loss(self.a(x), self.b(x), reduction="none")


GRAPHS = (Frozen, Decorated, Switched, Recomputed, spectral)
OWN_CODE = (Adversarial, Captured, WrittenAside, Hooked, Updating)


def build(kind: Any, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().train(training)


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor | None]:
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    return loss.detach(), x.grad


@pytest.mark.parametrize("planned_in_training", [False, True], ids=["planned for evaluation", "planned for training"])
@pytest.mark.parametrize("kind", [*GRAPHS, *OWN_CODE])
def test_two_steps_of_training_are_the_models(kind: Any, planned_in_training: bool) -> None:
    ranks = 3 if kind is Adversarial else 2
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = build(kind, True)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    want = [step(plain, x, optimizer) for _ in range(2)]
    tracing = threading.Lock()

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            model = DistributedModelWrapper(
                build(kind, planned_in_training), ranks, group.rank, (x,), group=group
            ).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        got = [step(model, x, optimizer) for _ in range(2)]
        return model.plan, got, model.full_state_dict()

    results = run_ranks(ranks, body)
    for plan, got, _ in results:
        assert plan.mode == "graph" or (kind is Updating and planned_in_training)
        assert_close(got, want)
    assert_close(results[0][2], dict(plain.state_dict()))


def test_calls_that_record_no_gradients_run_the_graph_and_the_plan_says_what_others_do() -> None:
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    want = build(Adversarial, False)(x).detach()
    tracing = threading.Lock()

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            model = DistributedModelWrapper(build(Adversarial, False), 2, group.rank, (x,), group=group)
        with torch.no_grad():
            result = model(x)
        return model.plan, result, group.stats.snapshot()

    for plan, result, stats in run_ranks(2, body):
        assert plan.own_derivatives == ("Reversal has a derivative of its own",)
        assert "run the model's own code: Reversal has a derivative of its own" in str(plan)
        assert_close(result, want)
        assert stats["all_reduces"] == plan.summary()["all_reduces"]


def test_the_order_in_which_derivatives_are_found_changes_no_plan() -> None:
    class Negation(Reversal):
        pass

    class Either(Mlp):
        def __init__(self, *functions: Any) -> None:
            super().__init__()
            self.functions = functions

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return sum(function.apply(x) for function in self.functions)

    x = torch.randn(2, WIDTH)
    first, second = (make_plan(Either(*order), (x,), 2) for order in ((Reversal, Negation), (Negation, Reversal)))
    assert first.own_derivatives == second.own_derivatives == tuple(sorted(first.own_derivatives))
    assert len(first.own_derivatives) == 2


def test_what_keeps_nothing_back_leaves_no_trace() -> None:
    """A region over what depends on no parameter and no input with gradients, as rotary embeddings are written."""

    class Positions(Two):
        @torch.no_grad()
        def angles(self, ids: Tensor) -> Tensor:
            return torch.sin(ids[:, None] / torch.arange(1.0, WIDTH + 1, device=ids.device))

        def forward(self, ids: Tensor) -> Tensor:
            return self.a(self.angles(ids))

    plan = make_plan(Positions(), {"ids": torch.arange(5)}, 2)
    assert plan.mode == "graph"
    assert not any("detach" in str(step.fn) for step in plan.artifact.program.steps)


def test_hooks_of_parameters_are_said_to_stay_behind(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    model.up.weight.register_hook(lambda grad: grad * 2)
    DistributedModelWrapper(model, 1, 0, (torch.randn(2, WIDTH),))
    assert "gradient hooks of ['up.weight'] stay with the whole model" in caplog.text
