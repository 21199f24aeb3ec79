"""A new version of a loaded model is not planned again, and nothing else is taken for one."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from tensor_parallel import planned
from tensor_parallel.checkpoint import Source, open_source
from tensor_parallel.group import Group
from tensor_parallel.serving import ServedModel, load_model
from tests import checkpoints

CPU = torch.device("cpu")
IDS = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}


def load(source: Source, **options: object) -> ServedModel:
    return load_model(source, world_size=1, rank=0, device=CPU, group=Group(0, 1), options=options)


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of one architecture."""
    first = checkpoints.llama(tmp_path / "1")
    model = transformers.AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "2")
    return first, tmp_path / "2"


def unplannable(patched: pytest.MonkeyPatch) -> None:
    patched.setattr("tensor_parallel.planner.make.trace", None)


def test_a_new_version_is_planned_as_the_one_before(
    versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(open_source(versions[0]))
    unplannable(monkeypatch)
    second = load(open_source(versions[1]))
    assert (first.planned_by, second.planned_by) == ("this rank", "an earlier load")
    assert first.plan_digest == second.plan_digest
    assert first.shard_digest != second.shard_digest
    assert second.plan.verified == first.plan.verified == "whole model"
    for path, served in zip(versions, (first, second), strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            assert_close(served.run(IDS)["logits"], model(**IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_was_planned_is_forgotten_with_the_model(versions: tuple[Path, Path]) -> None:
    first = load(open_source(versions[0]))
    del first
    gc.collect()
    assert load(open_source(versions[1])).planned_by == "this rank"


def test_another_config_is_another_model(versions: tuple[Path, Path], tmp_path: Path) -> None:
    """With the same weights, names and sizes."""
    first = load(open_source(versions[0]))
    other = shutil.copytree(versions[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert config["hidden_act"] == "silu"
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    second = load(open_source(other))
    assert second.planned_by == "this rank"
    assert second.plan_digest != first.plan_digest


def test_another_number_of_ranks_dtype_or_example_is_planned_for_itself(versions: tuple[Path, Path]) -> None:
    path = versions[0]
    kept = load(open_source(path))
    two = load_model(open_source(path), world_size=2, rank=0, device=CPU, group=Group(0, 2))
    half = load(open_source(path, options={"dtype": "bfloat16"}))
    specs = [{"name": "input_ids", "dtype": "int64", "shape": [4, None], "low": 3, "high": 60}]
    given = load(open_source(path, options={"inputs": specs}))
    assert [model.planned_by for model in (kept, two, half, given)] == ["this rank"] * 4


def test_factories_may_build_anything() -> None:
    name = "tests.service.shard_models:mlp"
    first, second = (load(open_source(name, factories=[name])) for _ in range(2))
    assert (first.planned_by, second.planned_by) == ("this rank", "this rank")


def test_a_plan_that_nobody_verified_is_made_again_for_who_wants_it_verified(versions: tuple[Path, Path]) -> None:
    first = load(open_source(versions[0]), verify=False)
    second = load(open_source(versions[1]), verify=False)
    third = load(open_source(versions[1]), verify=True)
    assert [model.planned_by for model in (first, second, third)] == ["this rank", "an earlier load", "this rank"]
    assert third.plan.verified == "whole model"


def test_a_replacement_goes_by_the_plan_of_its_peers_only(versions: tuple[Path, Path]) -> None:
    first = load(open_source(versions[0]))
    assert load(open_source(versions[1]), known_plan="another").planned_by == "this rank"
    assert load(open_source(versions[1]), known_plan=first.plan_digest).planned_by == "an earlier load"


class Scaled(nn.Module):
    """Constants of its own, of a part, and made when it runs."""

    def __init__(self, scale: float, part: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.scale, self.part = nn.Linear(6, 6), torch.full((6,), scale), part
        self.number = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) * self.scale * torch.tensor([self.number, 1, 1, 1, 1, 1])
        return y if self.part is None else self.part(y)


def test_constants_of_a_program_are_those_of_its_own_archive(tmp_path: Path) -> None:
    """Some are part of its plan."""
    x, served = torch.randn(4, 6), []
    for scale in (2.0, 3.0, 3.0):
        model = Scaled(2.0, Scaled(scale)).eval()
        path = tmp_path / f"{len(served)}.pt2"
        torch.export.save(torch.export.export(model, (x,)), path)
        served.append(load(open_source(path)))
        with torch.no_grad():
            [got] = served[-1].run({"x": x}).values()
            assert_close(got, model(x))
    assert [model.planned_by for model in served] == ["this rank", "this rank", "an earlier load"]


def test_what_decides_a_plan_tells_architectures_apart(versions: tuple[Path, Path]) -> None:
    source = open_source(versions[0])
    model = source.build_meta()
    known = planned._architecture(source, model, 2)
    assert known == planned._architecture(open_source(versions[1]), open_source(versions[1]).build_meta(), 2)

    def changed(change: Callable[[nn.Module], object]) -> str:
        other = source.build_meta()
        change(other)
        return planned._architecture(source, other, 2)

    def narrow(other: Any) -> None:
        other.model.norm.weight = nn.Parameter(torch.empty(7, device="meta"))

    def tie(other: Any) -> None:
        other.model.layers[0].self_attn.k_proj = other.model.layers[0].self_attn.v_proj

    def stray(other: Any) -> None:
        other.model.scale = torch.ones(3)

    found = {known, changed(narrow), changed(tie), changed(stray)}
    found.add(changed(lambda other: next(other.buffers()).add_(1)))
    assert len(found) == 5
