"""Exported archives: rebuilt without weights, read by slices, results named as the model names them, sizes checked."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensor_parallel.checkpoint import load_shards, open_source
from tensor_parallel.errors import InvalidInput
from tensor_parallel.planner.shard import Shard
from tests import checkpoints

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.mlp_archive(tmp_path_factory.mktemp("archive") / "model.pt2")


def filled(source: Any) -> nn.Module:
    """The source's model with its weights in place."""
    model: nn.Module = source.build_meta()
    loaded = load_shards(source, dict.fromkeys(source.tensors(), Shard.replicated()), 0, device=CPU)
    model.load_state_dict(dict(loaded.tensors), assign=True, strict=False)
    return model


def exported(path: Path, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.export.save(torch.export.export(model.eval(), args, kwargs), path)
    return open_source(path, path.parent)


def test_it_computes_what_the_model_did(archive: Path) -> None:
    torch.manual_seed(0)
    want = checkpoints.make_mlp()(**checkpoints.mlp_inputs())
    got = filled(open_source(archive, archive.parent))(**checkpoints.mlp_inputs())
    assert list(got) == ["hidden", "pooled.mean", "parts.0", "parts.1"]
    assert torch.equal(got["hidden"], want["hidden"])
    assert torch.equal(got["parts.1"], want["parts"][1])


def test_weights_are_meta_and_read_by_slices(archive: Path) -> None:
    source = open_source(archive)
    model = source.build_meta()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    torch.manual_seed(0)
    want = checkpoints.make_mlp()
    assert torch.equal(source.read("up.weight", Shard.even(1, 16, 3), 2), want.up.weight.tensor_split(3, 1)[2])
    assert source.total_bytes == sum(value.nbytes for value in [*want.parameters(), *want.buffers()])
    assert source.digest() == open_source(archive).digest()


def test_inputs_are_named_and_sized_as_exported(archive: Path) -> None:
    source = open_source(archive)
    examples = source.example_inputs()
    assert {name: tuple(value.shape) for name, value in examples.items()} == {"x": (3, 5, 16), "mask": (3, 5)}
    check = source.constraints().check
    check({"x": (7, 9, 16), "mask": (7, 9)})
    for sizes, reason in [
        ({"x": (7, 9, 16), "mask": (7, 8)}, "must be equal"),
        ({"x": (7, 1, 16), "mask": (7, 1)}, "from 2 to 512"),
        ({"x": (7, 9, 15), "mask": (7, 9)}, "the model takes 16"),
        ({"x": (7, 9), "mask": (7, 9)}, "2 dimensions"),
    ]:
        with pytest.raises(InvalidInput, match=reason):
            check(sizes)


def test_options_that_make_no_sense_here_are_refused(archive: Path) -> None:
    with pytest.raises(InvalidInput, match="dtype"):
        open_source(archive, options={"dtype": "bfloat16"})
    with pytest.raises(InvalidInput, match="arguments"):
        open_source(archive, options={"kwargs": {"width": 3}})
    specs: list[dict[str, Any]] = [
        {"name": "x", "dtype": "float32", "shape": [4, None, 16]},
        {"name": "mask", "dtype": "float32", "shape": [4, None]},
    ]
    assert open_source(archive, options={"inputs": specs}).example_inputs()["x"].shape == (4, 16, 16)
    specs[1]["shape"] = [None, None]
    with pytest.raises(InvalidInput, match="must be equal"):
        open_source(archive, options={"inputs": specs}).example_inputs()


class Shaped(nn.Module):
    """Gives its result in the form asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return {
            "bare": y,
            "tuple": (y, y + 1),
            "single": (y,),
            "list": [y, {"deep": y + 1}],
            "ordered": OrderedDict(b=y, a=y + 1),
            "nothing": (y, None),
            "nested": {"k": [y, y + 1], "m": {"n": y + 2}},
        }[self.form]


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("bare", ["output"]),
        ("tuple", ["output_0", "output_1"]),
        ("single", ["output_0"]),
        ("list", ["output_0", "output_1.deep"]),
        ("ordered", ["b", "a"]),
        ("nothing", ["output_0", "output_1"]),
        ("nested", ["k.0", "k.1", "m.n"]),
    ],
)
def test_results_have_the_models_own_names(form: str, names: list[str], tmp_path: Path) -> None:
    model, x = Shaped(form), torch.randn(2, 4)
    got = filled(exported(tmp_path / "m.pt2", model, x))(x=x)
    assert list(got) == names
    assert torch.equal(got[names[0]], model.layer(x))


class Nested(nn.Module):
    """Takes a list, a flag and an absent argument."""

    def forward(self, xs: list[Tensor], flag: bool = True, mask: Tensor | None = None) -> Tensor:
        y = xs[0] + 2 * xs[1] if flag else xs[0]
        return y if mask is None else y * mask


def test_nested_arguments_become_flat_and_constants_disappear(tmp_path: Path) -> None:
    xs = [torch.randn(2, 3), torch.randn(2, 3)]
    source = exported(tmp_path / "m.pt2", Nested(), xs, True)
    names = list(source.example_inputs())
    assert names == ["xs_0", "xs_1"]
    assert torch.equal(source.build_meta()(xs_0=xs[0], xs_1=xs[1])["output"], xs[0] + 2 * xs[1])


class Views(nn.Module):
    """Weights that share storage: tied, transposed and a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6, bias=False)
        self.b = nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Parameter(torch.randn(4, 6).t())
        self.register_buffer("d", torch.randn(10)[2:8])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) @ self.c + self.d[:4]


def test_shared_and_strided_storage_is_read_right(tmp_path: Path) -> None:
    model, x = Views(), torch.randn(2, 6)
    source = exported(tmp_path / "m.pt2", model, x)
    assert source.tensors()["a.weight"] is source.tensors()["b.weight"]
    assert torch.equal(source.read("c", Shard.even(0, 6, 2), 1), model.c[3:])
    assert torch.allclose(filled(source)(x=x)["output"], model(x))


def test_an_exported_transformers_model_keeps_its_result_names(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoints.bert(tmp_path / "bert"), add_pooling_layer=False)
    ids = torch.ones(2, 5, dtype=torch.int64)
    source = exported(tmp_path / "m.pt2", model, input_ids=ids)
    got = filled(source)(input_ids=ids)
    assert list(got) == ["last_hidden_state"]
    assert torch.allclose(got["last_hidden_state"], model(input_ids=ids).last_hidden_state, atol=1e-6)
