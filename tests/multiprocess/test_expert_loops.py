"""Mixtures of experts that loop over the experts hit, over real processes: outputs, collectives, gradients."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from tensor_parallel.wrapper import DistributedModelWrapper
from tests.multiprocess.ranks import Place, on_ranks
from tests.unit.test_planner_hits import WIDTH, Mixture, Modular, inputs


def runs_as_unsharded(place: Place) -> None:
    for model in (Mixture().double(), Modular().double()):
        examples = [x.double() for x in inputs()]
        group = place.group()
        wrapper = DistributedModelWrapper(model, place.world_size, place.rank, {"x": examples[0]}, group=group)
        assert wrapper.plan.mode == "graph"
        hit = set()
        for x in examples:
            hit.add(frozenset(model.route(x.reshape(-1, WIDTH)).topk(2, -1).indices.flatten().tolist()))
            before = group.stats.all_reduces
            with torch.no_grad():
                assert_close(wrapper(x=x), model(x))
            assert group.stats.all_reduces - before == wrapper.plan.summary()["all_reduces"] == 1
            model.zero_grad()
            wrapper.zero_grad()
            wrapper(x=x).square().sum().backward()
            model(x).square().sum().backward()
            whole = dict(model.named_parameters())
            for name, parameter in wrapper.named_parameters():
                want = whole[name].grad
                got = parameter.grad
                if want is None or got is None:  # an expert without tokens takes part in one computation only
                    assert not any(grad is not None and grad.any() for grad in (want, got)), name
                else:
                    assert_close(got, wrapper.plan.shards[name].take(want, place.rank))
        assert len(hit) > 2


def test_it_computes_learns_and_communicates_as_planned() -> None:
    on_ranks(2, runs_as_unsharded, timeout=200)
