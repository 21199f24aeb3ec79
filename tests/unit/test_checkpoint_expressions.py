"""Any box of any expression over stored tensors reads as the same operations on tensors in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tensor_parallel.checkpoint import transfer
from tensor_parallel.checkpoint.expression import Compute, whole
from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.checkpoint.safetensors_header import read_header
from tensor_parallel.checkpoint.stored import StoredFile
from tensor_parallel.checkpoint.transfer import read_box, read_whole

torch.manual_seed(0)
VALUES = {
    "a": torch.randn(12, 8),
    "b": torch.randn(12, 8),
    "c": torch.randn(6, 4, 10).bfloat16(),
    "q": torch.randn(24, 6),
    "i": torch.arange(7),
    "s": torch.tensor(3.0),
    "e": torch.empty(0, 4),
}

MOVES: dict[str, tuple[Callable[..., Any], str]] = {
    "as stored": (lambda a, c, i, s, e: [a, c, i, s, e], "a c i s e"),
    "stacked": (lambda a, b: torch.stack([a, b]), "a b"),
    "experts": (lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1), "a b"),
    "stacked inside": (lambda a, b: torch.stack([a, b], 1).transpose(0, 2), "a b"),
    "transposed": (lambda a: a.t().contiguous(), "a"),
    "chunks": (lambda q: torch.chunk(q, 3, 0), "q"),
    "split": (lambda q: torch.split(q, [5, 9, 10], 0), "q"),
    "unbound": (lambda c: torch.unbind(c, 1), "c"),
    "rotary permutation": (lambda q: q.view(3, 4, 2, 6).transpose(1, 2).reshape(24, 6), "q"),
    "interleaved, then cut": (
        lambda q: torch.chunk(q.reshape(12, 2, 6).transpose(0, 1).reshape(24, 6).contiguous(), 2, 0),
        "q",
    ),
    "merged after a transposition": (lambda c: c.transpose(1, 2).reshape(60, 4)[3:50], "c"),
    "dimensions of one": (lambda c: c.unsqueeze(1).squeeze(1).permute(2, 0, 1)[None], "c"),
    "negative dimensions": (lambda c: c.transpose(-1, -2).unsqueeze(-1).squeeze(-1).select(-1, -2), "c"),
    "slices of slices": (lambda a: a[2:9][1:, :6], "a"),
}
CALCULATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "widened": (lambda c: c.to(torch.float32), "c"),
    "rounded twice": (lambda a: a.to(torch.bfloat16).to(torch.float32), "a"),
    "arithmetic": (lambda a, b: a * 2 + b, "a b"),
    "every third": (lambda a: a[None, 2:5, ::3], "a"),
    "flattened stack": (lambda a, b: torch.stack([a, b]).view(6, 4, 8)[1:5], "a b"),
    "several results": (lambda a: torch.topk(a, 2, dim=1).values, "a"),
    "with a tensor in memory": (lambda a: torch.cat([a, torch.ones(2, 8)]), "a"),
}


@pytest.fixture(scope="module")
def lazy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LazyTensor]:
    folder = tmp_path_factory.mktemp("stored")
    save_file(VALUES, folder / "x.safetensors")
    return {
        name: LazyTensor.stored(tensor)
        for name, tensor in read_header(StoredFile(folder / "x.safetensors", folder)).items()
    }


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(
    "limits", [(8 << 20, 4096), (64, 0), (8, 0)], ids=["whole", "small staging", "smallest staging"]
)
@pytest.mark.parametrize("what", [*MOVES, *CALCULATIONS])
def test_any_box_reads_as_in_memory(
    what: str, limits: tuple[int, int], lazy: dict[str, LazyTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STAGING_BYTES", limits[0])
    monkeypatch.setattr(transfer, "SMALL_GAP_BYTES", limits[1])
    function, names = {**MOVES, **CALCULATIONS}[what]
    rng = random.Random(what)
    wanted = listed(function(*(VALUES[name] for name in names.split())))
    for want, got in zip(wanted, listed(function(*(lazy[name] for name in names.split()))), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert torch.equal(read_whole(got.node), want)
        for _ in range(6):
            box = tuple((start := rng.randint(0, size), rng.randint(start, size)) for size in want.shape)
            part = want
            for dim, (start, stop) in enumerate(box):
                part = part.narrow(dim, start, stop - start)
            assert torch.equal(read_box(got.node, box), part), box


@pytest.mark.parametrize("what", MOVES)
def test_data_movement_is_never_computed(what: str, lazy: dict[str, LazyTensor]) -> None:
    function, names = MOVES[what]
    for value in listed(function(*(lazy[name] for name in names.split()))):
        out = torch.empty(value.shape, dtype=value.dtype)
        assert not any(isinstance(job, Compute) for job in value.node.jobs(whole(value.shape), out))


def test_equality_is_decided_by_content_part_by_part(lazy: dict[str, LazyTensor]) -> None:
    assert torch.equal(lazy["a"], lazy["a"])
    assert torch.equal(lazy["a"] * 1, lazy["a"])
    assert not torch.equal(lazy["a"], lazy["b"])
    assert not torch.equal(lazy["a"], lazy["q"])


def test_it_is_a_parameter_like_any_other(lazy: dict[str, LazyTensor]) -> None:
    parameter = torch.nn.Parameter(lazy["a"])
    assert isinstance(parameter, torch.nn.Parameter)
    assert isinstance(parameter, LazyTensor)
    assert torch.equal(read_whole(parameter.node), VALUES["a"])
    assert "LazyTensor" in repr(parameter)


def test_a_stored_value_cannot_be_changed(lazy: dict[str, LazyTensor]) -> None:
    with torch.no_grad(), pytest.raises(NotImplementedError, match="in place"):
        lazy["a"].zero_()


def test_initialising_a_derived_value_changes_nothing(lazy: dict[str, LazyTensor]) -> None:
    derived = lazy["a"] * 2
    with torch.no_grad():
        derived.normal_()
    assert torch.equal(read_whole(derived.node), VALUES["a"] * 2)


@pytest.mark.parametrize("strides", [(0, 1), (1, 12), (16, 2), (4, 1)])
def test_strided_storage_of_any_kind_reads_right(strides: tuple[int, int], lazy: dict[str, LazyTensor]) -> None:
    """Archives may hold expanded, transposed, spaced and overlapping views of one storage."""
    from tensor_parallel.checkpoint.expression import View

    node = lazy["a"].node
    assert isinstance(node, View)
    shape = (6, 8) if strides != (1, 12) else (12, 8)
    region = node.region.as_strided(shape, strides, 0)
    want = VALUES["a"].as_strided(shape, strides, 0)
    assert torch.equal(read_whole(View(node.source, region)), want)
    assert torch.equal(read_box(View(node.source, region), ((1, 5), (2, 7))), want[1:5, 2:7])


def columns_of(value: Tensor, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    return (*whole(value.shape[:-1]), (start, stop))


def test_columns_of_a_wide_matrix_are_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.randn(64, 8192)
    save_file({"w": wide}, tmp_path / "x.safetensors")
    stored = read_header(StoredFile(tmp_path / "x.safetensors", tmp_path))["w"]
    read = 0
    original = StoredFile.read_into

    def counting(file: StoredFile, buffer: memoryview, offset: int) -> None:
        nonlocal read
        read += len(buffer)
        original(file, buffer, offset)

    monkeypatch.setattr(StoredFile, "read_into", counting)
    node = LazyTensor.stored(stored).node
    assert torch.equal(read_box(node, columns_of(wide, 2048, 4096)), wide[:, 2048:4096])
    assert read == 64 * 2048 * 4
    read = 0
    assert torch.equal(read_box(node, ((8, 16), (0, 8192))), wide[8:16])
    assert read == 8 * 8192 * 4
