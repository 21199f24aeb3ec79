"""Loading a rank's shards: what is read and held, progress, cancellation, failures that name their tensor, digests."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tensor_parallel.checkpoint import Source, load, load_shards
from tensor_parallel.checkpoint.digest import combined_digest, content_digest
from tensor_parallel.checkpoint.lazy import LazyTensor
from tensor_parallel.checkpoint.memory import available_bytes, empty_weight, peak_bytes
from tensor_parallel.checkpoint.options import SourceOptions
from tensor_parallel.checkpoint.prepared import PreparedMemory
from tensor_parallel.checkpoint.safetensors_header import read_header
from tensor_parallel.checkpoint.stored import StoredFile, StoredTensor
from tensor_parallel.errors import CheckpointError, DoesNotFit, LoadCancelled
from tensor_parallel.planner.shard import Shard

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class Files(Source):
    """The tensors of one safetensors file, as they are, and one that is in no file."""

    kind = "test"

    def __init__(self, path: Path) -> None:
        super().__init__(path, SourceOptions())
        self.header = read_header(StoredFile(path, path.parent))
        self.lazy: dict[str, Tensor] = {name: LazyTensor.stored(tensor) for name, tensor in self.header.items()}
        self.lazy["alias"] = self.lazy["rows"]
        self.lazy["computed"] = torch.arange(10.0)

    def _build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        return nn.Module(), self.lazy

    def _describe(self) -> dict[str, object]:
        return {}

    def stored(self) -> Iterator[StoredTensor]:
        yield from self.header.values()

    def example_inputs(self) -> dict[str, Tensor]:
        return {}


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"rows": torch.randn(600, 1000), "columns": torch.randn(300, 8192), "half": torch.randn(64, 32).half()}


@pytest.fixture
def source(values: dict[str, Tensor], tmp_path: Path) -> Files:
    save_file(values, tmp_path / "x.safetensors")
    return Files(tmp_path / "x.safetensors")


SHARDS = {
    "rows": Shard.even(0, 600, 3),
    "alias": Shard.even(0, 600, 3),
    "columns": Shard(1, (((0, 2048), (4096, 5000)), ((2048, 4096),), ((5000, 8192),))),
    "half": Shard.replicated(),
    "computed": Shard.even(0, 10, 3),
}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("rank", range(3))
def test_a_rank_reads_its_slices_and_no_more(
    rank: int, threads: int, source: Files, values: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, read = threading.Lock(), 0
    original = StoredFile.read_into

    def counting(file: StoredFile, buffer: memoryview, offset: int) -> None:
        nonlocal read
        with lock:
            read += len(buffer)
        original(file, buffer, offset)

    monkeypatch.setattr(StoredFile, "read_into", counting)
    loaded = load_shards(source, SHARDS, rank, device=CPU, threads=threads)
    for name, value in (values | {"computed": torch.arange(10.0), "alias": values["rows"]}).items():
        assert torch.equal(loaded.tensors[name], SHARDS[name].take(value, rank)), name
    assert loaded.tensors["alias"] is loaded.tensors["rows"]
    distinct = {id(tensor): tensor.nbytes for tensor in loaded.tensors.values()}
    assert loaded.nbytes == sum(distinct.values())
    assert read == loaded.nbytes - loaded.tensors["computed"].nbytes


def test_progress_ends_at_the_bytes_held_and_never_goes_back(source: Files) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load_shards(source, SHARDS, 0, device=CPU, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {loaded.nbytes}
    assert seen[0][0] < loaded.nbytes == seen[-1][0]


def test_a_load_is_cancelled_between_reads(source: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "BATCH_BYTES", 1 << 16)
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)

    with pytest.raises(LoadCancelled):
        load_shards(source, SHARDS, 0, device=CPU, progress=progress, cancelled=lambda: len(seen) > 2)
    assert seen[-1] < sum(value.nbytes for value in source.tensors().values())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_file_truncated_while_it_is_read_names_tensor_and_file(source: Files) -> None:
    with source.path.open("r+b") as file:
        file.truncate(source.header["rows"].offset + 100)
    with pytest.raises(CheckpointError, match=r"tensor \w+: x\.safetensors ends at"):
        load_shards(source, SHARDS, 2, device=CPU)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_tensor_that_the_checkpoint_does_not_know_is_named(source: Files) -> None:
    with pytest.raises(CheckpointError, match="other"):
        load_shards(source, {"other": Shard.replicated()}, 0, device=CPU)
    with pytest.raises(CheckpointError, match="other"):
        source.read("other", Shard.replicated(), 0)


def test_memory_that_does_not_suffice_is_a_typed_error(source: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory")

    monkeypatch.setattr(load, "empty_weight", refuse)
    with pytest.raises(DoesNotFit, match="rank 1's part of rows"):
        load_shards(source, SHARDS, 1, device=CPU)


def test_a_rank_without_a_part_holds_an_empty_one(source: Files) -> None:
    shards = {"rows": Shard.contiguous(0, [600, 0])}
    assert load_shards(source, shards, 1, device=CPU).tensors["rows"].shape == (0, 1000)
    assert source.read("rows", shards["rows"], 1).shape == (0, 1000)


def test_the_shard_digest_is_of_the_content_alone(values: dict[str, Tensor], tmp_path: Path) -> None:
    digests = []
    for at, changed in enumerate([{}, {"padding": torch.ones(77)}, {"half": values["half"] + 1}]):
        save_file({**values, **changed}, tmp_path / f"{at}.safetensors")
        digests.append(
            [load_shards(Files(tmp_path / f"{at}.safetensors"), SHARDS, rank, device=CPU).digest for rank in (0, 1)]
        )
    assert digests[0] == digests[1]  # other places in the file, same content
    assert digests[0][0] != digests[2][0]
    assert digests[0][0] != digests[0][1]


def test_digests_know_dtype_shape_and_order() -> None:
    one = torch.arange(6.0)
    assert content_digest(one) == content_digest(one.clone()) == content_digest(one.view(2, 3))
    assert content_digest(one) != content_digest(one.flip(0))
    assert content_digest(one.view(2, 3).t()) == content_digest(one.view(2, 3).t().contiguous())
    assert content_digest(torch.empty(0)) == content_digest(torch.empty(0, 3))
    parts = {
        name: combined_digest({"a": (dtype, shape, "x")})
        for name, dtype, shape in [
            ("1", torch.float32, (2, 3)),
            ("2", torch.float32, (3, 2)),
            ("3", torch.int32, (2, 3)),
        ]
    }
    assert len(set(parts.values())) == 3


PEAK = """
import resource, sys, torch
from pathlib import Path
from tensor_parallel.checkpoint import load_shards
from tensor_parallel.checkpoint.prepared import PreparedMemory
from tests.unit.test_checkpoint_load import Files
from tensor_parallel.planner.shard import Shard

source = Files(Path(sys.argv[1]))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_shards(source, {"half": Shard.replicated()}, 0, device=torch.device("cpu"))
before = peak()
shards = {"rows": Shard.even(0, 40000, 4), "columns": Shard.even(1, 8192, 4)}
with PreparedMemory(int(sys.argv[2])) as memory:
    memory.wait(10)
    loaded = load_shards(source, shards, 1, device=torch.device("cpu"), threads=2, memory=memory)
print(peak() - before, loaded.nbytes)
"""


@pytest.mark.parametrize("prepared", [0, (40_000 * 1024 + 5_000 * 8192) * 4 // 4])
def test_peak_memory_is_the_shard_and_a_staging_buffer_per_thread(prepared: int, tmp_path: Path) -> None:
    big = {"rows": torch.zeros(40_000, 1024), "columns": torch.zeros(5_000, 8192), "half": torch.zeros(2)}
    save_file(big, tmp_path / "x.safetensors")
    del big
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "x.safetensors"), str(prepared)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    grown, held = map(int, result.stdout.split())
    assert held == (40_000 * 1024 + 5_000 * 8192) * 4 // 4
    assert grown < held + 2 * (8 << 20) + (
        8 << 20
    )  # two staging buffers, huge page rounding and the threads themselves


def test_weights_are_allocated_as_asked() -> None:
    for shape, dtype in (((3, 5), torch.bfloat16), ((1200, 1001), torch.float32), ((0, 4), torch.int64)):
        tensor = empty_weight(shape, dtype, CPU)
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)


@pytest.mark.parametrize("prepared", [0.5, 1.0, 3.0])
def test_weights_lie_in_memory_that_was_prepared_as_far_as_it_goes(prepared: float, tmp_path: Path) -> None:
    """The rest is allocated, or given back."""
    torch.manual_seed(2)
    big = ("rows", "b", "c", "d")
    values = {name: torch.randn(1500, 1000) for name in big} | {"empty": torch.empty(0, 4), "one": torch.ones(1)}
    values |= {"bytes": torch.arange(100).to(torch.uint8), "half": torch.randn(7, 3).bfloat16()}
    save_file(values, tmp_path / "x.safetensors")
    shards = {name: Shard.even(0, 1500, 2) if name in big else Shard.replicated() for name in values}
    source = Files(tmp_path / "x.safetensors")
    held = load_shards(source, shards, 1, device=CPU)
    with PreparedMemory(int(held.nbytes * prepared)) as memory:
        mapped = range(memory.address, memory.address + memory.size)
        loaded = load_shards(source, shards, 1, device=CPU, memory=memory)
    inside = [tensor for tensor in loaded.tensors.values() if tensor.data_ptr() in mapped]
    assert loaded.digest == held.digest
    assert sum(tensor.nbytes for tensor in inside) >= min(prepared, 0.95) * held.nbytes - 3_000_000
    assert (len(inside) < len(values) - 1) == (prepared < 1)
    for name, value in values.items():
        assert torch.equal(loaded.tensors[name], shards[name].take(value, 1)), name
        assert loaded.tensors[name].untyped_storage().nbytes() == loaded.tensors[name].nbytes
        assert loaded.tensors[name].data_ptr() % 64 == 0
    resident, used = _resident(mapped), sum(tensor.nbytes for tensor in inside)
    assert used <= resident <= used + (2 << 20)
    del loaded, inside
    assert _resident(mapped) == 0


def _resident(addresses: range) -> int:
    """Bytes of memory behind the mapping that begins before these addresses, if there is one."""
    found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin < addresses.stop and addresses.start < end
        elif first == "Rss:" and inside:
            found += int(line.split()[1]) << 10
    return found


def test_memory_is_prepared_meanwhile_and_given_back_when_nothing_is_taken() -> None:
    with PreparedMemory(24 << 20) as memory:
        mapped = range(memory.address, memory.address + memory.size)
        deadline = time.monotonic() + 20
        while memory.present < memory.size and time.monotonic() < deadline:
            memory.wait(0.1)
        assert memory.present == memory.size == _resident(mapped) == 24 << 20
    assert _resident(mapped) == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "prepare-memory"]


def test_memory_is_prepared_only_where_there_is_room() -> None:
    assert PreparedMemory.for_weights(1 << 60, 1 << 10, CPU).size == 0
    assert PreparedMemory.for_weights(32 << 20, 2, torch.device("meta")).size == 0
    assert PreparedMemory.for_weights(32 << 20, 2, CPU).size in (0, 16 << 20)
    assert PreparedMemory.for_weights(32 << 20, 2, CPU, besides=10 << 20).size in (0, 6 << 20)
    assert PreparedMemory.for_weights(32 << 20, 2, CPU, besides=1 << 30).size == 0
    with PreparedMemory(0) as memory:
        assert memory.take([4], torch.float32) is None


GIVEN_BACK = """
import torch
from tensor_parallel.checkpoint.memory import give_back_freed

def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
tensors = [torch.ones(16_000) for _ in range(2000)]
tensors = tensors[-1:]
give_back_freed()
print(resident() - before)
"""


def test_what_was_freed_is_given_back_whatever_lies_behind_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 30e6  # of 128 MB


def test_memory_is_known_here() -> None:
    available = available_bytes(CPU)
    assert available is None or available > 0
    assert peak_bytes(CPU) > 0
    assert available_bytes(torch.device("meta")) is None
