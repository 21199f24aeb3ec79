"""Choosing a backend, and what it refuses, before any peer is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore

from tensor_parallel.backends import form_backend, shm, shm_library, shm_pure
from tensor_parallel.backends.layout import join_gathered, raw_bytes, split_for_ranks
from tensor_parallel.backends.shm_handshake import Host
from tensor_parallel.backends.staged import StagedBackend
from tensor_parallel.errors import ConfigError
from tensor_parallel.group import Backend


def form(kind: str, device: str = "cpu", rank: int = 0, world_size: int = 2) -> object:
    return form_backend(kind, store=HashStore(), rank=rank, world_size=world_size, device=device)


def test_an_unknown_kind_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'mpi': choose one of auto, gloo, nccl, shm"):
        form("mpi")


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_cpu_backends_refuse_what_is_neither_on_the_cpu_nor_on_a_gpu(kind: str) -> None:
    with pytest.raises(ConfigError, match="moves CPU tensors, not those of meta"):
        form(kind, "meta")


class InHostMemory:
    """A backend of two ranks for tensors in host memory, which have all the same."""

    name, rank, world_size = "host", 1, 2

    def __init__(self) -> None:
        self.calls: list[str] = []

    def all_reduce_sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._checked(tensor).mul_(2)

    def all_gather(self, tensor: torch.Tensor, sizes: list[int], dim: int) -> torch.Tensor:
        return torch.cat([self._checked(tensor)] * 2, dim)

    def reduce_scatter_sum(self, tensor: torch.Tensor, sizes: list[int], dim: int) -> torch.Tensor:
        return self._checked(tensor).narrow(dim, sizes[0], sizes[1]) * 2

    def broadcast_(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        return self._checked(tensor).fill_(src)

    def abort(self, reason: str) -> None:
        self.calls.append(f"abort {reason}")

    def barrier(self) -> None:
        self.calls.append("barrier")

    def check(self) -> None:
        self.calls.append("check")

    def close(self) -> None:
        self.calls.append("close")

    def _checked(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_cpu
        return tensor


def test_a_staged_backend_does_what_its_own_does() -> None:
    staged, x = StagedBackend(InHostMemory()), torch.ones(4, 2)
    assert isinstance(staged, Backend)
    assert staged.all_reduce_sum_(x) is x
    assert x.unique().tolist() == [2.0]
    assert torch.equal(staged.all_gather(x, [4, 4], 0), torch.cat([x, x]))
    assert torch.equal(staged.reduce_scatter_sum(x, [1, 3], 0), 2 * x[1:])
    assert staged.broadcast_(x, 1) is x
    assert x.unique().tolist() == [1.0]


def test_tensors_of_a_gpu_go_through_the_host_and_come_back() -> None:
    staged, gpu = StagedBackend(InHostMemory()), torch.device("cuda", 3)
    with FakeTensorMode():
        x = torch.ones(4, 2, device=gpu)
        results = [staged.all_gather(x, [4, 4], 0), staged.reduce_scatter_sum(x, [1, 3], 0)]
    assert [tuple(result.shape) for result in results] == [(8, 2), (3, 2)]
    assert {result.device for result in results} == {gpu}


def test_a_staged_backend_ends_as_its_own_does() -> None:
    host = InHostMemory()
    staged = StagedBackend(host)
    staged.barrier()
    staged.abort("enough")
    staged.check()
    staged.close()
    assert host.calls == ["barrier", "abort enough", "check", "close"]


def test_nccl_refuses_the_cpu() -> None:
    with pytest.raises(ConfigError, match="'nccl' needs a CUDA device"):
        form("nccl")


def test_an_impossible_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 2\)"):
        form("gloo", rank=2)


def test_shm_where_it_cannot_work_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "load_library", lambda: None)
    monkeypatch.setattr(shm_pure.platform, "machine", lambda: "aarch64")
    assert shm.this_host() != shm.this_host()  # shares memory with nobody
    with pytest.raises(ConfigError, match='compiled part or x86-64; use "gloo"'):
        form("shm")


@pytest.mark.skipif(not shm_pure.usable(), reason="the part in Python is for x86-64 only")
def test_without_its_compiled_part_shm_has_one_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "load_library", lambda: None)
    assert isinstance(shm.available_library(), shm_pure.PureLibrary)


def test_a_library_of_another_build_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_shm.so").write_bytes(b"not a library")
    monkeypatch.setattr(shm_library, "__file__", str(tmp_path / "shm_library.py"))
    assert shm_library.load_library.__wrapped__() is None
    assert "building the package again" in caplog.text


def test_a_host_is_equal_to_itself_and_to_no_process_that_shares_nothing() -> None:
    assert Host.here() == Host.here()
    assert Host.nowhere().identity != Host.nowhere().identity


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (4, 0)])
def test_splitting_for_ranks_and_joining_are_inverse(dim: int, sizes: tuple[int, int]) -> None:
    shape = [3, 5, 2]
    shape[dim] = 4
    whole = torch.randn(shape)
    flat = split_for_ranks(whole, sizes, dim)
    local = whole.narrow(dim, 0, sizes[0])
    assert torch.equal(join_gathered(raw_bytes(flat.contiguous()), local, sizes, dim), whole)
