"""Factories: run only if allowed, parameters never materialised when weights are given, errors that name them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tensor_parallel.checkpoint import load_shards, open_source
from tensor_parallel.errors import AccessDenied, CheckpointError, InvalidInput
from tensor_parallel.planner.shard import Shard
from tests import checkpoints

NAME = "tests.checkpoints:make_mlp"
HERE = "tests.unit.test_checkpoint_factory"
CPU = torch.device("cpu")


class Tied(nn.Module):
    """Two layers that share a weight, which is born large and must not stay so."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.arange(8.0), persistent=False)


def tied() -> tuple[Tied, dict[str, torch.Tensor]]:
    return Tied(), {"x": torch.zeros(2, 8)}


def fails() -> nn.Module:
    raise KeyError("no such size")


def returns_a_number() -> int:
    return 4


def bad_examples() -> tuple[nn.Module, Any]:
    return Tied(), {"x": 1}


not_callable = 3


def opened(name: str, root: Path | None = None, allowed: tuple[str, ...] = ("tests.*",), **options: Any) -> Any:
    return open_source(name, root, options=options, factories=allowed)


def replicated(source: Any) -> dict[str, torch.Tensor]:
    return load_shards(source, dict.fromkeys(source.tensors(), Shard.replicated()), 0, device=CPU).tensors


def test_without_weights_every_rank_gets_the_same_values() -> None:
    torch.manual_seed(1)
    first = replicated(opened(NAME, kwargs={"hidden": 24}))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = replicated(opened(NAME, kwargs={"hidden": 24}))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["up.weight"].shape == (24, 16)


def test_with_weights_parameters_are_never_materialised(tmp_path: Path) -> None:
    torch.manual_seed(3)
    want = checkpoints.make_mlp()
    save_file({**want.state_dict(), "extra": torch.ones(1)}, tmp_path / "w.safetensors")
    source = opened(NAME, tmp_path, weights="w.safetensors")
    model = source.build_meta()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    got = replicated(source)
    assert all(torch.equal(got[name], value) for name, value in [*want.named_parameters(), *want.named_buffers()])
    assert source.unused == ("extra",)
    assert torch.equal(source.read("up.weight", Shard.even(1, 16, 2), 1), want.up.weight[:, 8:])
    assert not nn.Linear(2, 2).weight.is_meta  # as before, for everybody else


def test_ties_and_example_inputs_are_kept(tmp_path: Path) -> None:
    save_file({"a.weight": torch.eye(8)}, tmp_path / "w.safetensors")
    source = opened(f"{HERE}:tied", tmp_path, weights="w.safetensors")
    model = source.build_meta()
    assert model.a.weight is model.b.weight
    assert source.tensors()["a.weight"] is source.tensors()["b.weight"]
    assert source.total_bytes == 8 * 8 * 4 + 8 * 4
    assert source.example_inputs()["x"].shape == (2, 8)


def test_another_dtype_may_be_asked_for(tmp_path: Path) -> None:
    want = checkpoints.make_mlp()
    save_file(want.state_dict(), tmp_path / "w.safetensors")
    got = replicated(opened(NAME, tmp_path, weights="w.safetensors", dtype="bfloat16"))
    assert torch.equal(got["up.weight"], want.up.weight.bfloat16())


@pytest.mark.parametrize(
    "allowed", [(), ("tests.checkpoints:other",), ("tests.checkpoint",), ("other.*", "tests.checkpoints:make")]
)
def test_a_factory_that_is_not_allowed_is_not_even_imported(allowed: tuple[str, ...]) -> None:
    with pytest.raises(AccessDenied, match="not on the list"):
        opened(NAME, allowed=allowed)
    with pytest.raises(AccessDenied):
        opened("antigravity:make", allowed=allowed)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("allowed", [(NAME,), ("tests.checkpoints:*",), ("tests.*",)])
def test_allowed_by_name_or_prefix(allowed: tuple[str, ...]) -> None:
    assert opened(NAME, allowed=allowed).kind == "factory"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fails", "KeyError"),
        ("returns_a_number", "int"),
        ("bad_examples", "example inputs"),
        ("not_callable", "not callable"),
        ("nothing", "cannot be imported"),
    ],
)
def test_a_factory_that_fails_is_named(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        opened(f"{HERE}:{name}").build_meta()
    with pytest.raises(CheckpointError, match="cannot be imported"):
        opened("tests.no_such_module:make")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = checkpoints.make_mlp().state_dict()
    save_file({name: value for name, value in state.items() if name != "up.bias"}, tmp_path / "less.safetensors")
    save_file({**state, "up.bias": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"missing.*up\.bias"):
        opened(NAME, tmp_path, weights="less.safetensors").build_meta()
    with pytest.raises(CheckpointError, match=r"up\.bias is \(3,\)"):
        opened(NAME, tmp_path, weights="other.safetensors").build_meta()
    with pytest.raises(AccessDenied):
        opened(NAME, tmp_path, weights="../w.safetensors")


def test_inputs_that_are_not_known_have_to_be_given() -> None:
    with pytest.raises(InvalidInput, match="option inputs"):
        opened(NAME).example_inputs()
    spec = {"name": "x", "dtype": "float32", "shape": [None, 5, 16]}
    assert opened(NAME, inputs=[spec]).example_inputs()["x"].shape[1:] == (5, 16)


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="kind"):
        open_source(tmp_path, kind="pickle")
    with pytest.raises(CheckpointError, match=r"package\.module:factory"):
        open_source("x", kind="factory")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a directory"):
        open_source(tmp_path / "file")
