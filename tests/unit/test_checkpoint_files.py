"""Safetensors headers and model paths: what is refused, and that the refusal names the file or tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tensor_parallel.checkpoint.paths import confine, open_regular, read_small
from tensor_parallel.checkpoint.safetensors_header import DTYPES, read_header
from tensor_parallel.checkpoint.stored import StoredFile
from tensor_parallel.errors import AccessDenied, CheckpointError


def header_of(path: Path) -> Any:
    return read_header(StoredFile(path, path.parent))


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_of_the_format_is_read(tmp_path: Path) -> None:
    values = {name: torch.zeros(3, dtype=dtype) for name, dtype in DTYPES.items()}
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = header_of(tmp_path / "x.safetensors")
    assert {name: tensor.dtype for name, tensor in header.items()} == DTYPES


BAD: dict[str, tuple[str, Any, bytes]] = {
    "not JSON": ("not valid JSON", b"{", b""),
    "nested too deep": ("not valid JSON", b"[" * 200_000, b""),
    "not an object": ("not an object", [1], b""),
    "twice": ("twice", b'{"a": 1, "a": 2}', b""),
    "no offsets": ("tensor a", {"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "negative size": ("tensor a", {"a": entry([-1], 0, 4)}, b"1234"),
    "size that is no number": ("tensor a", {"a": entry(["1"], 0, 4)}, b"1234"),
    "size that is a flag": ("tensor a", {"a": entry([True], 0, 4)}, b"1234"),
    "unknown dtype": ("tensor a: unknown dtype", {"a": entry([1], 0, 4, "F3")}, b"1234"),
    "dtype that is no text": ("tensor a: unknown dtype", {"a": {**entry([1], 0, 4), "dtype": [1]}}, b"1234"),
    "shape and bytes disagree": ("tensor a: 4 bytes stored", {"a": entry([2], 0, 4)}, b"1234"),
    "truncated data": ("truncated: tensor a", {"a": entry([2], 0, 8)}, b"1234"),
    "overlap": ("tensor b overlaps a", {"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456"),
    "gap": ("tensor b leaves a gap", {"a": entry([1], 0, 4), "b": entry([1], 5, 9)}, b"123456789"),
    "bytes of no tensor": ("belong to no tensor", {"a": entry([1], 0, 4)}, b"12345"),
    "enormous": ("truncated|bytes stored", {"a": entry([1 << 62, 1 << 62], 0, 4)}, b"1234"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_header_that_is_wrong_is_refused_by_name(what: str, tmp_path: Path) -> None:
    reason, header, data = BAD[what]
    with pytest.raises(CheckpointError, match=reason):
        header_of(written(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize(
    "data", [b"", b"1234567", (1 << 62).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}"]
)
def test_a_file_that_is_none_of_the_format_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        header_of(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(1000)}, path)
    file = StoredFile(path, tmp_path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="truncated"):
        file.read(0, 2000)


def test_descriptors_are_closed_with_the_last_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.randn(10)}, tmp_path / "x.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    held = header_of(tmp_path / "x.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del held
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "model").mkdir(parents=True)
    (tmp_path / "root" / "model" / "config.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "inner").symlink_to(tmp_path / "root" / "model")
    return tmp_path / "root"


def test_paths_inside_the_root_are_found_relative_or_absolute(root: Path) -> None:
    assert confine("model", root) == root / "model" == confine(root / "model", root)
    assert confine("./model/config.json", root) == root / "model" / "config.json"


def test_a_root_that_is_itself_reached_by_a_link_is_fine(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mount").symlink_to(root)
    assert confine(tmp_path / "mount" / "model", tmp_path / "mount") == root / "model"


@pytest.mark.parametrize("path", ["../outside", "model/../../outside", "/etc/passwd", "link", "link/x", "model/.."])
def test_paths_out_of_the_root_are_denied(path: str, root: Path) -> None:
    with pytest.raises(AccessDenied):
        confine(path, root)


def test_a_link_from_one_place_of_the_root_to_another_is_followed(root: Path) -> None:
    assert confine("inner/config.json", root) == root / "model" / "config.json"
    (root / "snapshot").mkdir()
    (root / "snapshot" / "config.json").symlink_to("../model/config.json")
    assert read_small(root / "snapshot" / "config.json", root / "snapshot", 10, root) == b"{}"
    with pytest.raises(AccessDenied, match="symbolic link"):
        read_small(root / "snapshot" / "config.json", root / "snapshot", 10)


@pytest.mark.parametrize("path", ["nothing", "", "a\0b", "a" * 5000, "a/" * 3000])
def test_paths_to_nothing_are_checkpoint_errors(path: str, root: Path) -> None:
    with pytest.raises(CheckpointError):
        confine(path, root)


def test_a_sibling_that_shares_the_roots_prefix_is_outside(root: Path, tmp_path: Path) -> None:
    (tmp_path / "rootless").mkdir()
    with pytest.raises(AccessDenied):
        confine(tmp_path / "rootless", root)


def test_files_of_a_checkpoint_may_be_neither_links_nor_pipes(root: Path, tmp_path: Path) -> None:
    (root / "model" / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(AccessDenied, match="symbolic link"):
        open_regular(root / "model" / "model.safetensors", root / "model")
    os.mkfifo(root / "model" / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_regular(root / "model" / "pipe", root / "model")
    with pytest.raises(CheckpointError, match="missing"):
        open_regular(root / "model" / "none", root / "model")


def test_small_files_have_a_limit(root: Path) -> None:
    assert read_small(root / "model" / "config.json", root, 2) == b"{}"
    with pytest.raises(CheckpointError, match="larger"):
        read_small(root / "model" / "config.json", root, 1)
