"""Mixtures of experts that loop over the experts hit: planned as graphs where skipping an expert is doing nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from tensor_parallel.planner import hits, make_plan, simulate
from tensor_parallel.planner.plan import Plan

WIDTH, INNER, EXPERTS = 16, 32, 4


class Mixture(nn.Module):
    """Experts by index into stacked weights; the last stands for "no expert"; written as published models write it."""

    def __init__(self, style: str = "tensor", columns: int = EXPERTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style, self.columns = style, columns
        self.route = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS - 1, WIDTH, INNER) / 4)
        self.bias = nn.Parameter(torch.randn(columns, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weight, chosen = self.route(flat).softmax(-1).topk(2, -1)
        final = torch.zeros_like(flat)
        mask = functional.one_hot(chosen, self.columns).permute(2, 1, 0)
        for expert in self.hit(mask):
            slot, token = torch.where(mask[expert].squeeze(0))
            if token.numel() == 0:
                continue
            self.accumulate(final, token, self.expert(flat[token], expert) * weight[token, slot, None])
        return final.reshape(x.shape)

    def hit(self, mask: Tensor) -> Any:
        found = torch.greater(mask.sum((-1, -2)), 0)
        if self.style == "tensor":
            return found.nonzero()
        if self.style == "tuple":
            return found.nonzero(as_tuple=True)[0]
        return found.nonzero().flatten()

    def expert(self, tokens: Tensor, expert: Any) -> Tensor:
        number = int(expert)
        if number == EXPERTS - 1:
            return tokens
        gate, up = functional.linear(tokens, self.up[number]).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down[number])

    def accumulate(self, final: Tensor, token: Tensor, states: Tensor) -> None:
        final.index_add_(0, token, states)


class Overwriting(Mixture):
    def accumulate(self, final: Tensor, token: Tensor, states: Tensor) -> None:
        final[token] += states


class Skipping(Mixture):
    """A column more than experts, which is skipped, as published models have it; a mask written to meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weight, chosen = self.route(flat).softmax(-1).topk(2, -1)
        final = torch.zeros_like(flat)
        mask = functional.one_hot(chosen, EXPERTS + 1).permute(2, 1, 0)
        found = torch.greater(mask.sum((-1, -2)), 0)
        hit = found.nonzero()
        found.logical_not_()
        for expert in hit:
            expert = expert[0]
            if expert == EXPERTS:
                continue
            slot, token = torch.where(mask[expert])
            final.index_add_(0, token, self.expert(flat[token], expert) * weight[token, slot, None])
        return final.reshape(x.shape)


class Modular(Mixture):
    """Experts as modules, found by an index tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
        )

    def expert(self, tokens: Tensor, expert: Any) -> Tensor:
        return self.experts[expert](tokens)


def inputs() -> list[Tensor]:
    """One token hits two of the experts; many hit all."""
    torch.manual_seed(3)
    return [torch.randn(2, 12, WIDTH), *torch.randn(6, 1, 1, WIDTH), torch.randn(5, 3, WIDTH)]


def check(model: nn.Module, plan: Plan, example: Tensor) -> None:
    state = dict(model.named_parameters())
    program, ranks = plan.artifact.program, range(plan.world_size)
    parts = {(name, rank): plan.shards[name].take(state[name].detach(), rank) for name in state for rank in ranks}
    for (got,) in simulate.run(program, [example], lambda name, rank: parts[name, rank], constants(plan)):
        assert_close(got, model(example).detach(), rtol=1e-4, atol=1e-5)


def constants(plan: Plan) -> dict[str, Tensor]:
    return dict(plan.artifact.signature.constants)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "build",
    [Mixture, lambda: Mixture("tuple"), lambda: Mixture("flat"), Modular, Overwriting, Skipping],
    ids=["tensor", "tuple", "flat", "modules", "overwriting", "skipping"],
)
def test_it_is_a_graph_and_right_whoever_is_hit(build: Any, ranks: int) -> None:
    model = build()
    hit = {frozenset(model.route(x.reshape(-1, WIDTH)).topk(2, -1).indices.flatten().tolist()) for x in inputs()}
    assert len(hit) > 2
    assert min(map(len, hit)) == 2
    plan = make_plan(model, {"x": inputs()[0]}, ranks)
    assert (plan.mode, plan.verified) == ("graph", "whole model"), plan.notes
    for x in inputs():
        check(model, plan, x)


def test_sums_over_experts_are_reduced_once() -> None:
    plan = make_plan(Mixture(), {"x": inputs()[0]}, 2)
    summary = plan.summary()
    assert (summary["all_reduces"], summary["all_gathers"]) == (1, 0)
    assert max(plan.bytes_per_rank) < 0.6 * plan.total_bytes


class Unselected(Mixture):
    """Adds to every token, for each expert hit."""

    def accumulate(self, final: Tensor, token: Tensor, states: Tensor) -> None:
        final.add_(states.sum())


class Rebinding(Mixture):
    """What one expert computes reaches the next otherwise than by writes."""

    total: Any = 0.0

    def expert(self, tokens: Tensor, expert: Any) -> Tensor:
        self.total = self.bias[int(expert)] + self.total
        return super().expert(tokens, expert) + self.total

    def forward(self, x: Tensor) -> Tensor:
        self.total = 0.0
        return super().forward(x)


class Elsewhere(Mixture):
    """Writes at positions that do not depend on what is selected."""

    def accumulate(self, final: Tensor, token: Tensor, states: Tensor) -> None:
        final.index_add_(0, torch.zeros(1, dtype=torch.long), states.sum(0, keepdim=True))


class Viewed(Mixture):
    """Writes through a view."""

    def accumulate(self, final: Tensor, token: Tensor, states: Tensor) -> None:
        final[:1].add_(states.sum(0))


class First(Mixture):
    """Only the first expert that is hit."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        final = torch.zeros_like(flat)
        mask = functional.one_hot(self.route(flat).argmax(-1), EXPERTS).t()
        for expert in (mask.sum(-1) > 0).nonzero():
            (token,) = torch.where(mask[expert].squeeze(0))
            final.index_add_(0, token, self.expert(flat[token], expert))
            break
        return final.reshape(x.shape)


class Listed(Mixture):
    """Reads the indices as numbers first: which of them belong to a body cannot be seen."""

    def hit(self, mask: Tensor) -> Any:
        return [int(expert) for expert in super().hit(mask)]

    def accumulate(self, final: Tensor, token: Tensor, states: Tensor) -> None:
        final.add_(1)


@pytest.mark.parametrize("build", [Listed, Unselected, Rebinding, Elsewhere, Viewed, First])
def test_loops_that_do_something_for_every_hit_are_not_unrolled(build: Any) -> None:
    plan = make_plan(build(), {"x": inputs()[0]}, 2)
    assert plan.mode == "modules"


@pytest.mark.parametrize("sizes", [(1,), (0, 1)])
def test_what_one_position_alone_decides_is_not_traced_as_for_many(sizes: tuple[int, ...]) -> None:
    class Alone(Mixture):
        def expert(self, tokens: Tensor, expert: Any) -> Tensor:
            states = super().expert(tokens, expert)
            return 2 * states if tokens.shape[0] in sizes else states

    assert make_plan(Alone(), {"x": inputs()[0]}, 2).mode == "modules"


def test_an_index_that_cannot_be_is_not_an_empty_selection() -> None:
    """Weights selected by an index of one dimension."""

    class Wide(Mixture):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            final = torch.zeros_like(x)
            mask = functional.one_hot(self.route(x).argmax(-1) + shift, EXPERTS + 1).t()
            for expert in (mask.sum(-1) > 0).nonzero():
                (token,) = torch.where(mask[expert].squeeze(0))
                final.index_add_(0, token, torch.einsum("td,eod->to", x[token], self.up[expert])[:, :WIDTH])
            return final

    model, x, (right, wrong) = Wide(), torch.randn(50, WIDTH), torch.tensor([0, 1])
    plan = make_plan(model, {"x": x, "shift": right}, 2)
    assert plan.mode == "graph", plan.notes
    parts = dict(model.named_parameters())

    def run(shift: Tensor) -> list[list[Any]]:
        def part(name: str, rank: int) -> Tensor:
            return plan.shards[name].take(parts[name].detach(), rank)

        return simulate.run(plan.artifact.program, [shift, x], part, constants(plan))

    for (got,) in run(right):
        assert_close(got, model(x, right).detach(), rtol=1e-4, atol=1e-5)
    for raises in (lambda: model(x, wrong), lambda: run(wrong)):
        with pytest.raises(IndexError):
            raises()


def test_an_index_that_cannot_be_is_an_index_error_as_unsharded() -> None:
    """A mask with a column for which there is no expert."""

    class Padded(Mixture):
        def __init__(self, pad: bool = False) -> None:
            super().__init__(columns=EXPERTS + 1)
            self.pad = pad

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            flat = x.reshape(-1, WIDTH)
            chosen = self.route(flat).argmax(-1) + shift
            final = torch.zeros_like(flat)
            mask = functional.one_hot(chosen, self.columns).t()
            for expert in (mask.sum(-1) > 0).nonzero():
                (token,) = torch.where(mask[expert].squeeze(0))
                final.index_add_(0, token, flat[token] @ self.up[expert[0]].t() @ self.up[expert[0]])
            return final.reshape(x.shape)

    model, x = Padded(), inputs()[0]
    right, wrong = torch.tensor(0), torch.tensor(1)
    plan = make_plan(model, {"x": x, "shift": right}, 2)
    assert plan.mode == "graph", plan.notes
    parts = dict(model.named_parameters())

    def run(shift: Tensor) -> list[list[Any]]:
        def part(name: str, rank: int) -> Tensor:
            return plan.shards[name].take(parts[name].detach(), rank)

        return simulate.run(plan.artifact.program, [shift, x], part, constants(plan))

    for (got,) in run(right):
        assert_close(got, model(x, right).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError):
        model(x, wrong)
    with pytest.raises(IndexError):
        run(wrong)


def test_loops_of_too_many_indices_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hits, "MOST", EXPERTS - 1)
    assert make_plan(Mixture(), {"x": inputs()[0]}, 2).mode == "modules"


def test_what_cannot_be_traced_as_it_is_written_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(Mixture(), {"x": inputs()[0]}, 2, verify=False)
    assert plan.mode == "graph"  # after an attempt that torch gives up
    assert capfd.readouterr() == ("", "")
