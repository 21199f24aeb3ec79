"""What a daemon does with a GPU, as far as a stand-in for CUDA's library can show: tests/gpu has the real one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch

from shardd.arena import Arena
from shardd.devices import normalise
from shardd.engine import Engine
from shardd.errors import judge, known
from shardd.generation import Generations
from shardd.metrics import Metrics
from shardd.models import Models
from shardd.progress import Progress
from tensor_parallel.checkpoint.memory import give_back_freed
from tensor_parallel.errors import device_failed, out_of_memory
from tensor_parallel.group import Group
from tests.service.shard_client import sealed_memory

GPU = torch.device("cuda", 3)


class Cuda:
    """The calls of CUDA's library that are used, and the device that each was made for. ``answer`` is what it says."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.current: torch.device | None = None
        self.calls: list[tuple[str, torch.device | None]] = []
        self.addresses: set[int] = set()

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.current = device
        yield
        self.current = None

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % 4096 == 0
        assert (size, flags) == (1 << 16, 0)
        self.calls.append(("register", self.current))
        self.addresses.add(address)
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        assert address in self.addresses
        self.calls.append(("unregister", self.current))
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", made.device)
    return made


def test_a_segment_is_registered_for_the_gpu_until_it_is_released(cuda: Cuda) -> None:
    arena = Arena(GPU)
    arena.add(sealed_memory(1 << 16))
    assert cuda.calls == [("register", GPU)]
    arena.release()
    assert cuda.calls == [("register", GPU), ("unregister", GPU)]


def test_a_driver_that_registers_nothing_only_costs_time(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: object, device: torch.device) -> None:
        assert device == GPU
        raise RuntimeError("CUDA error: operation not supported")  # as CUDA tells of the call before

    monkeypatch.setattr(torch, "zeros", kernel)
    cuda.answer = 801  # cudaErrorNotSupported
    arena = Arena(GPU)
    arena.add(sealed_memory(1 << 16))
    arena.release()
    assert cuda.calls == [("register", GPU)]


def test_on_the_cpu_nothing_is_registered(cuda: Cuda) -> None:
    arena = Arena(torch.device("cpu"))
    arena.add(sealed_memory(1 << 16))
    arena.release()
    assert cuda.calls == []


def test_the_executor_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with the first GPU, whatever another has chosen."""
    chosen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: chosen.append((threading.current_thread().name, gpu)))
    group: Any = Group(0, 1)
    engine = Engine(
        rank=0,
        device=GPU,
        group=group,
        generations=Generations(),
        models=Models(),
        progress=Progress(lambda: 0.0, lambda: 0),
        metrics=Metrics(0),
        log=None,  # type: ignore[arg-type]
    )
    engine.start()
    assert engine.stop(10)
    assert chosen == [("executor", GPU)]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    ],
)
def test_an_error_of_the_device_is_no_request_s_own(error: RuntimeError) -> None:
    """The context does not survive it: to answer the request and go on would fail every one that follows."""
    assert device_failed(error)
    verdict = judge(error)
    assert (verdict.code, verdict.collective, verdict.ours) == (grpc.StatusCode.UNAVAILABLE, True, False)
    assert known(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_is_nothing_worse(error: RuntimeError) -> None:
    assert out_of_memory(error)
    assert not device_failed(error)
    assert judge(error).code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("CUDA error")])
def test_a_model_s_own_errors_are_not_the_device_s(error: Exception) -> None:
    assert not device_failed(error)


def test_what_was_freed_on_a_gpu_is_given_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would keep it, and the next load find no room."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    give_back_freed()
    assert not emptied  # nothing of CUDA is started for it
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    give_back_freed()
    assert emptied == [1]


@pytest.mark.parametrize("told", ["GPU-0a1B", "MIG-0a1B", "gpu-0a1b", "0a1b"])
def test_the_uuid_of_a_gpu_or_of_a_part_of_one(told: str) -> None:
    assert normalise(told) == "GPU-0a1b"
