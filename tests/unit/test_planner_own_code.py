"""The trace is compared with the model's own code: what tracing made wrong is not served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tensor_parallel.planner import make_plan, verify
from tensor_parallel.planner.plan import Plan

WIDTH, EXPERTS = 16, 6


class Mixture(nn.Module):
    """Loops over the experts hit, which tracing visits all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.route = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.route(x).argmax(-1)
        mask = functional.one_hot(chosen, EXPERTS).T
        final, seen = torch.zeros_like(x), 0
        for expert in mask.sum(-1).nonzero():
            token = mask[expert].squeeze(0).nonzero().flatten()
            final.index_add_(0, token, functional.linear(x[token], self.experts[int(expert)]))
            seen += 1
        return self.end(final, seen)

    def end(self, final: Tensor, seen: int) -> Tensor:
        return final


class Counting(Mixture):
    """Keeps a plain number that depends on how many experts were hit: no tracing sees that."""

    def end(self, final: Tensor, seen: int) -> Tensor:
        return final / seen


class Numbering(Mixture):
    """Which expert comes first, none at all, how many came: with an example that hits all, as if all always were."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        mask = functional.one_hot(self.route(x).argmax(-1), EXPERTS).T * (x.abs().sum(-1) > 0).long()
        final, seen, last = torch.zeros_like(x), 0, 0
        for number, expert in enumerate(mask.sum(-1).nonzero()):
            token = mask[expert].squeeze(0).nonzero().flatten()
            states = functional.linear(x[token], self.experts[int(expert)])
            if self.what == "reshaped":
                states = states.view(states.shape[0], 4, -1).relu().view(states.shape[0], WIDTH)
            factor = {"number": number, "last": last}.get(self.what, 0) + 1
            final.index_add_(0, token, states * factor)
            seen, last = seen + 1, int(expert)
        if self.what == "any" and seen:
            final = final + 1
        return (final, seen) if self.what == "count" else final


class Suspicious(nn.Module):
    """Runs while it is traced, and otherwise does ``otherwise``."""

    def __init__(self, otherwise: str) -> None:
        super().__init__()
        self.otherwise = otherwise
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return self.layer(x)
        self.calls += 1
        if self.otherwise == "raises":
            raise RuntimeError("not now")
        return (self.layer(x),) if self.otherwise == "another structure" else 2 * self.layer(x)


def plan(model: nn.Module, **options: Any) -> Plan:
    return make_plan(model.eval(), (torch.randn(2, WIDTH),), 2, **options)


def test_a_number_that_no_trace_sees_is_found_out() -> None:
    right, wrong = plan(Mixture()), plan(Counting())
    assert (right.mode, right.verified) == ("graph", "whole model"), right.notes
    assert wrong.mode == "modules"
    assert "compared with the model's own code" in wrong.notes[0]
    assert plan(Counting(), verify=False).mode == "graph"  # nothing else would have found it


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", ["nothing", "number", "last", "any", "count", "reshaped"])
def test_what_depends_on_the_experts_visited_is_found_by_an_example_that_hits_all(what: str, training: bool) -> None:
    model, x = Numbering(what).train(training), torch.randn(200, WIDTH)
    assert len(model.route(x).argmax(-1).unique()) == EXPERTS
    found = make_plan(model, (x,), 2, training=training)
    assert found.mode == ("graph" if what == "nothing" else "modules"), found.notes


def test_a_loop_is_compared_in_training_with_nothing_dropped() -> None:
    class Dropping(Mixture):
        def end(self, final: Tensor, seen: int) -> Tensor:
            q = functional.dropout(final, 0.5, self.training)[None, None]
            return functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5 * self.training)[0, 0]

    found = make_plan(Dropping().train(), (torch.randn(2, WIDTH),), 2, training=True)
    assert (found.mode, found.verified) == ("graph", "whole model"), found.notes


def test_a_model_that_does_otherwise_than_its_trace_keeps_its_own_code() -> None:
    assert plan(Suspicious("doubles")).mode == "modules"


@pytest.mark.parametrize("otherwise", ["raises", "another structure"])
def test_what_cannot_be_compared_is_said(otherwise: str) -> None:
    model = Suspicious(otherwise)
    found = plan(model)
    assert (found.mode, found.verified) == ("graph", "whole model, as traced")
    assert float(model.calls) == 0  # a copy ran


def test_masked_scores_do_not_hide_a_difference() -> None:
    class Masking(Mixture):
        def end(self, final: Tensor, seen: int) -> Tensor:
            final = final if torch.compiler.is_compiling() else 2 * final
            return torch.cat([final, torch.full_like(final, torch.finfo(final.dtype).min)], -1)

    assert plan(Masking()).mode == "modules"
    want = torch.tensor([1.0, -1e9, 3.0])
    assert verify.distance(want + torch.tensor([0.0, 0.0, 0.3]), want) == pytest.approx(0.1)
    assert verify.distance(torch.tensor([1.0, -2e9, 3.0]), want) == pytest.approx(1.0)


def test_rounding_that_a_model_amplifies_is_not_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that is right in float64 is right."""

    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            total = self.layer(x).sum(-1)
            other = self.layer(x).double().sum(-1).to(x.dtype) if not torch.compiler.is_compiling() else total
            return x + 1e7 * (other - total).unsqueeze(-1)

    assert plan(Chaotic()).mode == "graph"

    def fail(*_: object) -> None:
        raise RuntimeError("no float64")

    monkeypatch.setattr(verify, "_wide", fail)
    assert plan(Chaotic()).mode == "modules"
