"""Models loaded by a plan that a peer has made."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tensor_parallel import Group, planned
from tensor_parallel.checkpoint import Source, open_source
from tensor_parallel.errors import NotPortable
from tensor_parallel.serving import ServedModel, load_model
from tests import checkpoints
from tests.simulated import run_ranks
from tests.unit.test_planner_portable import Inputs, mlp


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.mlp_archive(tmp_path_factory.mktemp("archive") / "model.pt2")


def load(source: Source, rank: int, **options: object) -> ServedModel:
    group = Group(rank, 2)
    return load_model(source, world_size=2, rank=rank, device=torch.device("cpu"), group=group, options=options)


def test_a_replacement_does_not_trace(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [load(open_source(archive), rank) for rank in range(2)]
    data = ours[0].export_plan()
    with monkeypatch.context() as patched:
        patched.setattr("tensor_parallel.planner.make.trace", None)
        theirs = [load(open_source(archive), rank, plan=data, known_plan=ours[0].plan_digest) for rank in range(2)]
    assert [model.planned_by for model in (*ours, *theirs)] == [
        "this rank",
        "an earlier load",
        "a peer",
        "a peer",
    ]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.plan_digest, mine.shard_digest) == (other.plan_digest, other.shard_digest)
        assert other.plan.verified == "by its peers"
        assert mine.inputs == other.inputs

    def answers(models: list[ServedModel]) -> Any:
        def body(group: Group) -> Any:
            module: Any = models[group.rank]._module
            module._group.bind(group.backend)
            return models[group.rank].run(checkpoints.mlp_inputs())

        return run_ranks(2, body)

    for have, want in zip(answers(theirs), answers(ours), strict=True):
        assert_close(have, want, rtol=0, atol=0)


def test_what_is_no_plan_costs_time_only(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = load(open_source(archive), 0).plan_digest
    gc.collect()
    other = load(open_source(archive), 1, plan=b"junk", known_plan=digest)
    assert other.planned_by == "this rank"
    assert other.plan_digest == digest
    assert "the plan of a peer cannot be used: this is no plan" in caplog.text


@pytest.mark.parametrize(
    "error", [RuntimeError("bad device"), NotImplementedError("not registered"), NotPortable("no")]
)
def test_whatever_is_wrong_with_a_plan_a_rank_plans_itself(
    error: Exception, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    digest = load(open_source(archive), 0).plan_digest
    planned._keepers.clear()
    monkeypatch.setattr("tensor_parallel.planner.portable.unpack_for", fail)
    assert load(open_source(archive), 0, plan=b"junk", known_plan=digest).planned_by == "this rank"


def looking() -> tuple[nn.Module, Inputs]:
    """A factory of a model with a branch."""
    model, example, _ = mlp()
    return model, example


def test_programs_for_other_ways_are_there_after_a_load() -> None:
    name = f"{__name__}:looking"
    first = load(open_source(name, factories=[name]), 0)
    again = load(open_source(name, factories=[name]), 0, plan=first.export_plan(), known_plan=first.plan_digest)
    assert again.planned_by == "a peer"
    assert len(first.plans) == 2
    module: Any = again._module
    module._planner = None  # nothing is planned later
    x = mlp()[1]["x"]
    for values, plan in zip((x, x + 200), again.plans, strict=True):
        assert module.runner_by_name({"x": values})[0].plan.digest() == plan.digest()
