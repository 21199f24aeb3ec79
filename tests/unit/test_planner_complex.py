"""Complex weights and activations: gradients as unsharded, and a verification that does not take them for zeros."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import Group
from tensor_parallel.planner import make_plan, verify
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.simulated import run_ranks

WIDTH, MODES = 12, 4


class Complex(nn.Module):
    """The real and the imaginary part apart; the second weight's input is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(*sizes, dtype=torch.complex128) for sizes in ((WIDTH, 32), (32, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(torch.complex(x, x.flip(-1)))
        return self.down(torch.complex(hidden.real.relu(), hidden.imag.relu())).abs()


class Spectral(nn.Module):
    """A Fourier neural operator: low frequencies are written into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.out = nn.Linear(1, 16), nn.Conv1d(16, 24, 1), nn.Linear(24, 1)
        self.modes = nn.Parameter(torch.randn(16, 24, MODES, dtype=torch.complex128) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x.unsqueeze(-1)).transpose(1, 2)
        frequencies = torch.fft.rfft(x)
        low = torch.zeros(len(x), 24, frequencies.shape[-1], dtype=frequencies.dtype)
        low[..., :MODES] = torch.einsum("bik,iok->bok", frequencies[..., :MODES], self.modes)
        low[0] = low[0] * 2
        x = torch.tanh(torch.fft.irfft(low, n=x.shape[-1]) + self.skip(x))
        return self.out(x.transpose(1, 2)).squeeze(-1)


def build(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind()
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.is_complex() else parameter.data.double()
    return model


@pytest.mark.parametrize("kind", [Complex, Spectral])
@pytest.mark.parametrize("ranks", [2, 3])
def test_results_and_gradients_are_the_models(kind: Any, ranks: int) -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    model = build(kind)
    whole = x.clone().requires_grad_()
    want = model(whole)
    want.square().sum().backward()
    tracing = threading.Lock()

    def body(group: Group) -> tuple[Any, ...]:
        with tracing:
            sharded = DistributedModelWrapper(build(kind), ranks, group.rank, (x,), group=group)
        mine = x.clone().requires_grad_()
        got = sharded(mine)
        got.square().sum().backward()
        return sharded.plan, got.detach(), mine.grad, {name: p.grad for name, p in sharded.named_parameters()}

    for rank, (plan, got, grad, grads) in enumerate(run_ranks(ranks, body)):
        assert plan.mode == "graph"
        assert plan.summary()["bytes_per_rank"] < 0.6 * plan.summary()["total_bytes"]
        assert_close(got, want.detach())
        assert_close(grad, whole.grad)
        for name, parameter in model.named_parameters():
            assert_close(grads[name], plan.shards[name].take(parameter.grad, rank), msg=name)


def test_a_wrong_rule_for_complex_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.simulate.run

    def wrong(*args: Any) -> Any:
        return [[-value if isinstance(value, Tensor) else value for value in flat] for flat in right(*args)]

    monkeypatch.setattr(verify.simulate, "run", wrong)
    plan = make_plan(build(Complex), {"x": torch.randn(3, WIDTH, dtype=torch.float64)}, 2)
    assert plan.mode == "modules"
