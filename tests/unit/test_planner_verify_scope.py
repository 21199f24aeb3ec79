"""Which plans are compared with the model before they are trusted: with dropout too, and of larger models."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tensor_parallel.planner import runtime, verify
from tensor_parallel.planner.make import make_plan


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(functional.relu(self.up(self.norm(x))))
        heads = hidden.view(*hidden.shape[:-1], 4, 8).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2 if self.training else 0.0)
        return x + self.dropout(self.down(mixed.transpose(1, 2).flatten(-2)))


def build() -> nn.Module:
    return nn.Sequential(Layer(), Layer())


EXAMPLE = {"input": torch.randn(2, 5, 16)}


@pytest.mark.parametrize("training", [False, True])
def test_a_right_plan_is_verified_with_dropout_too(training: bool) -> None:
    plan = make_plan(build(), EXAMPLE, 2, training=training)
    assert (plan.mode, plan.verified) == ("graph", "whole model")
    assert plan.summary()["all_reduces"] == 2


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_plan_is_refused_and_the_first_difference_named(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "add_once", lambda pending, whole, alpha, first: pending + whole)  # on every rank
    plan = make_plan(build(), EXAMPLE, 2, training=training)
    assert plan.mode == "modules"
    assert "first difference: add" in plan.notes[0] or "first difference: linear" in plan.notes[0]
    trusted = make_plan(build(), EXAMPLE, 2, training=training, verify=False)
    assert (trusted.mode, trusted.verified) == ("graph", "no")


def test_layers_share_values_where_the_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LIMIT", 1000)
    assert make_plan(build(), EXAMPLE, 2).verified == "whole model, layers alike"
    monkeypatch.setattr(verify, "ALIKE_LIMIT", 1000)
    assert make_plan(build(), EXAMPLE, 2).verified == "no: too large"


def test_numbers_that_ranks_draw_for_themselves_are_not_compared() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x)
            return self.down(hidden + torch.rand_like(hidden))

    plan = make_plan(Noisy(), {"x": torch.randn(2, 16)}, 2)
    assert (plan.mode, plan.verified) == ("graph", "no: random")
