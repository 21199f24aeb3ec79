"""A model served by one rank: what it reports, what it refuses, and that its weights are watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tensor_parallel import planned, serving
from tensor_parallel.checkpoint import Source, open_source
from tensor_parallel.errors import DoesNotFit, InvalidInput, LoadCancelled, PlanError
from tensor_parallel.group import Group
from tensor_parallel.serving import ServedModel, load_model
from tests import checkpoints

CPU = torch.device("cpu")


def load(source: Source, **options: object) -> ServedModel:
    return load_model(source, world_size=1, rank=0, device=CPU, group=Group(0, 1), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.mlp_archive(tmp_path_factory.mktemp("archive") / "model.pt2")


def test_it_answers_and_reports_what_it_is(archive: Path) -> None:
    source = open_source(archive)
    seen: list[tuple[int, int]] = []
    model = load(source, progress=lambda done, total: seen.append((done, total)))
    torch.manual_seed(0)
    with torch.inference_mode():
        want = checkpoints.make_mlp()(**checkpoints.mlp_inputs())
    got = model.run(checkpoints.mlp_inputs())
    assert list(got) == ["hidden", "pooled.mean", "parts.0", "parts.1"] == [output.name for output in model.outputs]
    assert torch.allclose(got["hidden"], want["hidden"], atol=1e-6)
    assert not got["hidden"].requires_grad
    assert model.bytes_held == source.total_bytes == seen[-1][0]
    assert model.source_digest == source.digest()
    assert len(model.plan_digest) > 16
    assert model.peak_bytes > model.bytes_held
    assert sorted(spec.name for spec in model.inputs) == ["mask", "x"]
    assert model.optional_inputs == frozenset()


def test_two_loads_hold_the_same_and_a_changed_weight_shows(archive: Path) -> None:
    first, second = load(open_source(archive)), load(open_source(archive))
    assert first.shard_digest == second.shard_digest
    assert first.checksum() == second.checksum()
    with torch.no_grad():
        weight = next(iter(second._module.parameters()))
        weight[0] += 1
    assert first.checksum() != second.checksum()


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.layer(x) + self.offset


def counting() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return Counting(), {"x": torch.ones(2, 4)}


def test_what_a_model_writes_itself_does_not_count_as_changed() -> None:
    name = "tests.unit.test_serving_model:counting"
    model = load(open_source(name, factories=(name,)))
    before = model.checksum()
    model.run({"x": torch.zeros(2, 4)})
    held = dict(model._module.named_buffers())
    assert (model.plan.mode, held["seen"].item()) == ("graph", 1.0)
    assert model.checksum() == before
    held["offset"][0] += 1
    assert model.checksum() != before


def test_sizes_are_checked_against_each_other(archive: Path) -> None:
    model = load(open_source(archive))
    inputs = checkpoints.mlp_inputs()
    model.validate(inputs)
    with pytest.raises(InvalidInput, match="must be equal"):
        model.validate(inputs | {"mask": torch.ones(3, 4)})
    with pytest.raises(InvalidInput, match="mask is missing"):
        model.validate({"x": inputs["x"]})


def test_a_rank_that_has_no_room_says_so(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "available_bytes", lambda device: 100)
    with pytest.raises(DoesNotFit, match="rank 0"):
        load(open_source(archive))


@pytest.mark.parametrize("checks", [0, 1, 2])
def test_a_load_is_cancelled_at_any_stage(checks: int, archive: Path) -> None:
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > checks

    with pytest.raises(LoadCancelled):
        load(open_source(archive), cancelled=cancelled)


@pytest.mark.parametrize(
    ("x", "mask", "reason"),
    [
        ({"shape": [None, None, 15]}, {}, "dimension 2, the model takes 16"),
        ({"dtype": "float64"}, {}, "float64, the program takes float32"),
        ({}, {"name": "other"}, "x, mask|mask, x"),
        ({}, {"shape": [7, None]}, "must be equal"),
    ],
)
def test_given_inputs_must_be_those_of_the_program(
    x: dict[str, object], mask: dict[str, object], reason: str, archive: Path
) -> None:
    specs = [
        {"name": "x", "dtype": "float32", "shape": [None, None, 16], **x},
        {"name": "mask", "dtype": "float32", "shape": [None, None], **mask},
    ]
    with pytest.raises(InvalidInput, match=reason):
        load(open_source(archive, options={"inputs": specs}))


PICKY = "tests.service.shard_models:picky"


def picky(inputs: list[dict[str, object]] | None = None, **kwargs: bool) -> Source:
    return open_source(PICKY, options={"kwargs": kwargs, "inputs": inputs or []}, factories=[PICKY])


def on_each_rank(source: Callable[[], Source], **options: object) -> list[ServedModel]:
    """Loaded by two ranks that have no group yet: whatever loading does, it does alone."""
    return [
        load_model(source(), world_size=2, rank=rank, device=CPU, group=Group(rank, 2), **options)  # type: ignore[arg-type]
        for rank in range(2)
    ]


def test_a_model_that_always_raises_is_not_loaded() -> None:
    with pytest.raises(InvalidInput, match=r"forward raised LookupError: no five.*x float32\[2, 16\].*--model-input"):
        on_each_rank(picky)
    assert [model.plan.mode for model in on_each_rank(picky, options={"verify": False})] == ["modules", "modules"]


def test_a_known_plan_is_neither_verified_nor_tried_again(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = load(open_source(archive)), load(picky(fits=True))
    assert (first.plan.verified, other.plan.mode) == ("whole model", "modules")

    def fail(*_: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr("tensor_parallel.planner.verify.verify", fail)
    monkeypatch.setattr(serving, "_rehearse", fail)
    planned._keepers.clear()
    again = load(open_source(archive), options={"known_plan": first.plan_digest})
    assert (again.plan.verified, again.plan_digest) == ("by its peers", first.plan_digest)
    assert load(picky(fits=True), options={"known_plan": other.plan_digest}).plan_digest == other.plan_digest
    for source in (open_source(archive), picky(fits=True)):
        planned._keepers.clear()
        with pytest.raises((AssertionError, PlanError), match="checked again"):
            load(source, options={"known_plan": "of another plan"})


def test_it_is_tried_with_the_inputs_that_the_user_describes() -> None:
    fives = [{"name": "x", "dtype": "int64", "shape": [None, 16], "low": 5, "high": 6}]
    with pytest.raises(InvalidInput, match="forward raised RuntimeError"):  # fives, but no floating point numbers
        on_each_rank(lambda: picky(fives))
    models = on_each_rank(lambda: picky(fits=True))
    assert [model.plan.mode for model in models] == ["modules", "modules"]
    assert all(model.bytes_held < 0.6 * model.plan.total_bytes for model in models)


def test_a_model_that_cannot_be_traced_at_all_is_a_plan_error(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the model's own code")

    monkeypatch.setattr("tensor_parallel.planner.make_plan", fail)
    with pytest.raises(PlanError, match=r"model\.pt2 cannot be planned: ZeroDivisionError"):
        load(open_source(archive))


class Padded(torch.nn.Module):
    """Looks whether anything is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        return hidden if mask.all() else hidden * mask.unsqueeze(-1)


def padded() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Padded().eval(), {"x": torch.zeros(2, 8), "mask": torch.ones(2, dtype=torch.bool)}


def test_no_request_waits_for_a_plan() -> None:
    """What inputs decide is planned for when the model is loaded, whichever way it goes."""
    model = load(
        open_source("tests.unit.test_serving_model:padded", factories=("tests.unit.test_serving_model:padded",))
    )
    assert model.plan.mode == "graph"
    model._module._planner = None
    unsharded = padded()[0]
    for mask in 2 * (torch.tensor([True, True]), torch.tensor([True, False])):
        inputs = {"x": torch.randn(2, 8), "mask": mask}
        with torch.no_grad():
            assert torch.allclose(model.run(inputs)["output"], unsharded(**inputs), atol=1e-6)


def test_names_in_any_order_and_sizes_one_after_another(archive: Path) -> None:
    model = load(open_source(archive))
    for rows in (2, 3, 2, 3):
        x, mask = torch.randn(rows, 5, 16), torch.rand(rows, 5)
        asked = [{"x": x, "mask": mask}, {"mask": mask, "x": x}]
        torch.manual_seed(0)
        with torch.no_grad():
            want = checkpoints.make_mlp()(x=x, mask=mask)["hidden"]
        for inputs in asked:
            assert torch.allclose(model.run(inputs, model.validate(inputs))["hidden"], want, atol=1e-6)
