"""Memory shared with the coordinator: what may be mapped, what may be read, and where outputs go."""

from __future__ import annotations

import fcntl
import os

import pytest
import torch

from protos.tensor_parallel.v1 import shard_pb2, tensor_pb2
from shardd.arena import ALIGNMENT, MAX_SEGMENTS, Arena, copy_into, layout, new_segment
from shardd.errors import InvalidRequest
from tests.service.shard_client import sealed_memory

FLOAT = tensor_pb2.FLOAT32


def ref(offset: int, size: int, segment: int = 0) -> shard_pb2.ArenaRef:
    return shard_pb2.ArenaRef(offset=offset, byte_size=size, segment=segment)


def tensor(*shape: int) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(name="x", dtype=FLOAT, shape=shape)


@pytest.fixture
def arena():
    made = Arena()
    made.add(sealed_memory(1 << 16))
    yield made
    made.release()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["unsealed", "empty", "file", "pipe"])
def test_only_memory_that_cannot_shrink_is_mapped(kind: str, tmp_path) -> None:
    """A reader of a mapping whose file was shrunk is killed by SIGBUS."""
    before = open_descriptors()
    if kind == "pipe":
        descriptor, other = os.pipe()
        os.close(other)
    elif kind == "file":
        (tmp_path / "file").write_bytes(bytes(4096))
        descriptor = os.open(tmp_path / "file", os.O_RDWR)
    else:
        descriptor = sealed_memory(4096 if kind == "unsealed" else 0, seals=0 if kind == "unsealed" else 2)
    with pytest.raises(InvalidRequest, match="is empty" if kind == "empty" else "sealed against shrinking"):
        Arena().add(descriptor)
    assert open_descriptors() == before


def test_there_is_an_end_to_segments(arena: Arena) -> None:
    before = open_descriptors()
    for _ in range(MAX_SEGMENTS - 1):
        arena.add(sealed_memory(4096))
    with pytest.raises(InvalidRequest, match="at most"):
        arena.add(sealed_memory(4096))
    arena.release()
    assert open_descriptors() <= before


@pytest.mark.parametrize(
    ("place", "shape", "says"),
    [
        (ref(0, 8), (3,), "needs 12 bytes, its place has 8"),
        (ref((1 << 16) - 8, 16), (4,), "not in the arena"),
        (ref(1 << 40, 16), (4,), "not in the arena"),
        (ref(0, 16, segment=1), (4,), "not in the arena"),
    ],
)
def test_nothing_outside_of_it_is_read(arena: Arena, place, shape, says) -> None:
    with pytest.raises(InvalidRequest, match=says):
        arena.input(tensor(*shape), place)


def test_what_was_placed_is_read_back_and_outlives_the_mapping(arena: Arena) -> None:
    values = {"a": torch.arange(5.0), "b": torch.zeros(0), "c": torch.arange(12.0).reshape(3, 4).T}
    refs = arena.place(values, ref(64, 4096))
    assert refs is not None
    assert all(each.offset % ALIGNMENT == 0 for each in refs)
    assert [each.byte_size for each in refs] == [20, 0, 48]
    read = [arena.input(tensor(*value.shape), place) for value, place in zip(values.values(), refs, strict=True)]
    arena.release()
    for value, got in zip(values.values(), read, strict=True):
        assert torch.equal(got, value)


def test_what_does_not_fit_is_not_placed_in_part(arena: Arena) -> None:
    before = arena.input(tensor(256), ref(0, 1024)).clone()
    assert arena.place({"a": torch.ones(16), "b": torch.ones(256)}, ref(0, 1024)) is None
    assert torch.equal(arena.input(tensor(256), ref(0, 1024)), before)
    with pytest.raises(InvalidRequest, match="not in the arena"):
        arena.place({"a": torch.ones(16)}, ref(0, 1 << 20))


def test_a_segment_of_our_own_keeps_its_size() -> None:
    values = {"a": torch.arange(9.0)}
    refs, end = layout(values, 0, 7)
    descriptor, memory = new_segment(end)
    try:
        copy_into(memory, values, refs)
        assert refs[0].segment == 7
        assert memory[:36] == values["a"].numpy().tobytes()
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 1)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 1 << 20)
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    finally:
        os.close(descriptor)
