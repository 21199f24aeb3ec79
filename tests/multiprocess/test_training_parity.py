"""Training six families of transformers sharded, over two and four ranks, against the unsharded model: the first step's
gradients, the norm they are clipped by, the losses of twenty steps of AdamW, and the weights they end in. Two of them
with sequence parallelism too."""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tensor_parallel import wrapper as wrapping
from tensor_parallel.planner.make import make_plan
from tensor_parallel.planner.plan import Plan
from tensor_parallel.wrapper import DistributedModelWrapper
from tests.multiprocess.forked import run_forked
from tests.multiprocess.ranks import Place, Ranks
from tests.multiprocess.training_models import TRANSFORMERS, Case

STEPS = 20
JOBS = ((2, torch.float32), (4, torch.float64))
IN_ROWS = ("gpt2", "llama")


def relative(got: Tensor, want: Tensor, scale: float) -> float:
    return float((got - want).abs().max()) / scale if want.numel() else 0.0


def train_beside(place: Place, case: Case, plan: Plan, dtype: torch.dtype) -> None:
    exact = dtype == torch.float64
    model, batch = case.model(dtype), case.batch(dtype)
    with patch.object(wrapping, "plan_skeleton", lambda *args, **kwargs: plan):
        wrapper = DistributedModelWrapper(model, place.world_size, place.rank, batch, group=place.group("gloo"))
    both = (
        (model, torch.optim.AdamW(model.parameters(), 1e-2)),
        (wrapper, torch.optim.AdamW(wrapper.parameters(), 1e-2)),
    )
    stats = place.group("gloo").stats
    before = stats.snapshot()
    case.loss(wrapper, batch)
    after = stats.snapshot()
    for kind in ("all_reduces", "all_gathers", "reduce_scatters"):
        assert after[kind] - before[kind] == plan.summary()[kind], kind
    for step in range(STEPS):
        losses = []
        for module, optimizer in both:
            optimizer.zero_grad()
            loss = case.loss(module, batch)
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4), step
        if step == 0:
            same_gradients(place, model, wrapper, 1e-6 if exact else 1e-4)
        norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.5), wrapper.clip_grad_norm_(0.5)]
        assert float(norms[1]) == pytest.approx(float(norms[0]), rel=1e-5 if exact else 2e-3), step
        for _, optimizer in both:
            optimizer.step()
    final = wrapper.full_state_dict()
    if place.rank == 0:
        fresh = case.model(dtype)
        fresh.load_state_dict(final)  # an ordinary checkpoint: every name is there, and no other
        trained = model.state_dict()
        for name, tensor in fresh.state_dict().items() if exact else ():
            assert relative(tensor, trained[name], float(trained[name].abs().max())) < 1e-5, name


def same_gradients(place: Place, model: nn.Module, wrapper: DistributedModelWrapper, tolerance: float) -> None:
    whole: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in whole.values() if p.grad is not None)
    for name, parameter in wrapper.named_parameters():
        want = whole[name].grad
        assert (parameter.grad is None) == (want is None), name
        if want is not None:
            # A bias of keys has no gradient but rounding: softmax does not see it.
            scale = max(float(want.abs().max()), 1e-6 * largest)
            mine = wrapper.plan.shards[name].take(want, place.rank)
            assert relative(parameter.grad, mine, scale) < tolerance, name


def train_all(place: Place, plans: Mapping[str, Plan], dtype: torch.dtype) -> None:
    for name, plan in plans.items():
        try:
            train_beside(place, TRANSFORMERS[name], plan, dtype)
        except Exception as error:
            raise AssertionError(f"{name} over {place.world_size} ranks in {dtype}") from error


def plan_and_train(place: Place) -> list[str]:
    """One process plans for two ranks, another for four, at the same time; each then forks its ranks."""
    world, dtype = JOBS[place.rank]
    plans = {}
    for name, case in TRANSFORMERS.items():
        model, batch = case.model(dtype), case.batch(dtype)
        plans[name] = make_plan(model, batch, world, training=True, verify=False)  # the training is the check
    rows = {}
    for name in IN_ROWS:
        model, batch = TRANSFORMERS[name].model(torch.float64), TRANSFORMERS[name].batch(torch.float64)
        rows[name] = make_plan(model, batch, world, training=True, verify=False, sequence_parallel=True)
        assert rows[name].summary()["all_reduces"] == 0 < rows[name].summary()["reduce_scatters"]

    def train(rank: Place) -> None:
        train_all(rank, plans, dtype)
        train_all(rank, rows, torch.float64)

    run_forked(place, world, train, timeout=100)
    return [f"{name}: {plan.mode}" for name, plan in plans.items()]


@pytest.mark.timeout(290)
def test_transformers_train_as_unsharded_over_two_and_four_ranks() -> None:
    with Ranks(2) as fresh:  # autograd may have started threads in those that have run other tests, and these fork
        results = fresh.run(plan_and_train, timeout=280)
    for modes in results:
        assert modes == [f"{name}: graph" for name in TRANSFORMERS]
