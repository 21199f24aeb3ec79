"""The model's own code over divided parameters, read and written in whatever way it does."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tensor_parallel import Group
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks

WIDTH, RANKS = 12, 3


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mlp(), Mlp()
        self.table = nn.Parameter(torch.randn(40, WIDTH) / 4)

    def halved(self, x: Tensor) -> Tensor:
        while float(x.detach().abs().max()) > 1.0:
            x = x / 2
        return x


class Penalised(Untraceable):
    """All parameters, by iteration."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.halved(x))) + sum(p.square().sum() for p in self.parameters()) + self.table.norm()


class FirstWithout(Untraceable):
    """Read where no gradient is recorded, and then where one is."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.table.norm() + self.a.up.weight.norm()
        return self.a(self.halved(x)) @ self.table.t() @ self.table / scale


class Averaging(Untraceable):
    """Parameters are written to, by name and by iteration, and used in the same call."""

    def __init__(self) -> None:
        super().__init__()
        self.b.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for name, target in self.b.named_parameters():
                target.mul_(0.9).add_(self.a.get_parameter(name), alpha=0.1)
            self.b.up.weight.data = self.b.up.weight.data * 0.5
            self.table[0] = self.table.mean(0)
            target = self.b(x)
        return self.a(self.halved(x)) - target + self.table[0]


class Recomputed(Untraceable):
    """The backward reads parameters again."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.a, self.halved(x), use_reentrant=False)
        return checkpoint(self.pair, y, checkpoint(self.b, y, use_reentrant=True), use_reentrant=False)


class Replaced(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        parameters = {name: p - 0.1 * p.sign() * p.norm() for name, p in self.a.named_parameters()}
        return torch.func.functional_call(self.a, parameters, (self.halved(x),)) + self.b(x)


class Parametrised(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(weight_norm(nn.Linear(WIDTH, 32)), nn.Tanh(), spectral_norm(nn.Linear(32, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.halved(x)))


class Scripted(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.c = torch.jit.script(Mlp())

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.halved(x)))


class Compiled(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.c = torch.compile(nn.Bilinear(WIDTH, WIDTH, WIDTH), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.halved(x))
        return functional.normalize(self.c(y, y))


class Counting(nn.Module):
    """Keeps a number, and a tensor, between calls; in attributes that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls, self.cache = Mlp(), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.a(x)
        self.cache = y if self.cache is None else torch.cat([self.cache, y])
        return self.cache.sum(0) * self.calls


class Noting(nn.Module):
    """What it keeps is never read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.seen, self.last = Mlp(), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = self.a(x)
        return self.last * 2


def build(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().train()


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:`torch.jit.script` is not supported")
@pytest.mark.parametrize(
    "kind", [Penalised, FirstWithout, Averaging, Recomputed, Replaced, Parametrised, Scripted, Compiled]
)
def test_three_steps_of_training_are_the_models(kind: Any) -> None:
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = build(kind)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01)
    want = [step(plain, x, optimizer) for _ in range(3)]
    tracing = threading.Lock()

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            model = DistributedModelWrapper(build(kind), RANKS, group.rank, (x,), group=group)
        assert model.plan.mode == "modules"
        assert model.plan.shards["table"].local_size(group.rank) in (13, 14)
        assert next(model.parameters()).numel() < plain.table.numel()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        return [step(model, x, optimizer) for _ in range(3)], model.full_state_dict()

    results = run_ranks(RANKS, body)
    for losses, _ in results:
        assert_close(losses, want)
    assert_close(results[0][1], dict(plain.state_dict()))


@pytest.mark.parametrize("kind", [Counting, Noting])
def test_what_is_kept_between_calls_decides_later_ones_as_unsharded(kind: Any) -> None:
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    model = build(kind).eval()
    with torch.no_grad():
        want = [model(x) for _ in range(3)]
    tracing = threading.Lock()

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            model = DistributedModelWrapper(build(kind).eval(), RANKS, group.rank, (x,), group=group)
        with torch.no_grad():
            return model.plan, [model(x) for _ in range(3)]

    for plan, got in run_ranks(RANKS, body):
        assert_close(got, want)
        assert plan.mode == ("modules" if kind is Counting else "graph")
        if kind is Counting:
            assert "depends on calls before it, by cache, calls, which is no buffer" in plan.notes[0]


class CheckpointedTable(Untraceable):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def through(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table.t()) @ self.table

    def forward(self, x: Tensor) -> Tensor:
        return self.a(checkpoint(self.through, self.halved(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("between", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_call_before_the_backward_leaves_its_gradients_alone(reentrant: bool, between: Any) -> None:
    """Activations are computed again in the backward, after a call that recorded nothing."""

    def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        loss = model(x).square().sum()
        with between():
            model(x.detach() / 2)
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.manual_seed(0)
    model = CheckpointedTable(reentrant).double()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    want = gradients(model, x.clone().requires_grad_())
    model.zero_grad()
    tracing = threading.Lock()

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            wrapper = DistributedModelWrapper(model, 2, group.rank, (x,), group=group)
        return wrapper.plan, gradients(wrapper, x.clone().requires_grad_())

    for rank, (plan, got) in enumerate(run_ranks(2, body)):
        assert plan.mode == "modules"
        for name, gradient in want.items():
            if gradient is None:
                assert got[name] is None, name
            else:
                assert_close(got[name], plan.shards[name].take(gradient, rank))
