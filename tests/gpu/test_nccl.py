"""NCCL on real GPUs: results, and leaving a group whose peer was killed."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch

from tensor_parallel.backends import form_backend
from tensor_parallel.errors import CollectiveAborted, CollectiveError, ConfigError
from tensor_parallel.group import Backend
from tensor_parallel.nccl_environment import NCCL_ENVIRONMENT
from tests.multiprocess.ranks import Place, Ranks

pytestmark = pytest.mark.gpu
needs_one = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def form(place: Place, name: str = "") -> Backend:
    os.environ.update(NCCL_ENVIRONMENT)  # read by torch when the first communicator is made
    return form_backend(
        "nccl",
        store=place.store(f"nccl/{name}"),
        rank=place.rank,
        world_size=place.world_size,
        device=torch.device("cuda", place.rank),
        timeout=timedelta(seconds=30),
    )


def results(place: Place) -> None:
    backend, device = form(place), torch.device("cuda", place.rank)
    world = place.world_size
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int16):
        x = torch.arange(12, device=device).reshape(4, 3).to(dtype)
        assert torch.equal(backend.all_reduce_sum_(x.clone()), x * world)
        assert torch.equal(backend.all_gather(x, [4] * world, 0), torch.cat([x] * world))
        assert torch.equal(backend.all_gather(x, [3] * world, 1), torch.cat([x] * world, 1))
        for sizes in ([4] + [0] * (world - 1), [len(part) for part in torch.arange(4).tensor_split(world)]):
            start = sum(sizes[: place.rank])
            mine = x[start : start + sizes[place.rank]]
            assert torch.equal(backend.all_gather(mine.contiguous(), sizes, 0), x)
            assert torch.equal(backend.reduce_scatter_sum(x, sizes, 0), mine * world)
        assert torch.equal(backend.broadcast_(x + place.rank, world - 1), x + world - 1)
    backend.barrier()
    backend.close()


def leave_a_killed_peer(place: Place) -> float:
    from tensor_parallel.backends.nccl import device_usable

    backend, device = form(place), torch.device("cuda", place.rank)
    weights = torch.ones(1000, device=device)
    place.store().set(f"running/{place.rank}", "1")
    if place.rank == 1:
        threading.Event().wait()
    aborted: list[float] = []

    def supervise() -> None:
        place.store("supervisor").wait(["killed"], timedelta(seconds=20))
        aborted.append(time.monotonic())
        backend.abort("told that a peer is lost")

    thread = threading.Thread(target=supervise)
    thread.start()
    with pytest.raises((CollectiveError, RuntimeError)):
        _forward(backend, device)
    thread.join(20)
    with pytest.raises(CollectiveAborted):
        backend.check()
    backend.close()
    assert device_usable(device)
    assert weights.sum().item() == 1000
    return time.monotonic() - aborted[0]


def leave_and_form_again(place: Place) -> None:
    """Generations of one process, each with a communicator of its own."""
    device = torch.device("cuda", place.rank)
    for generation in range(3):
        backend = form(place, f"generation {generation}")
        place.store().set(f"formed/{generation}/{place.rank}", "1")
        place.store().wait([f"formed/{generation}/{rank}" for rank in range(place.world_size)], timedelta(seconds=60))
        backend.abort("the generation ends")
        with pytest.raises(CollectiveAborted):
            backend.all_reduce_sum_(torch.ones(1, device=device))
        backend.close()
    last = form(place, "last")
    assert last.all_reduce_sum_(torch.ones(1, device=device)).item() == place.world_size
    last.close()


def _forward(backend: Backend, device: torch.device) -> None:
    backend.all_reduce_sum_(torch.ones(1 << 20, device=device))
    torch.cuda.synchronize(device)
    backend.check()


@needs_two
@pytest.mark.timeout(120)
def test_results_on_two_gpus() -> None:
    with Ranks(2) as ranks:
        ranks.run(results, timeout=100)


@needs_one
@pytest.mark.timeout(120)
def test_results_on_one_gpu() -> None:
    with Ranks(1) as ranks:
        ranks.run(results, timeout=100)


@needs_two
@pytest.mark.timeout(120)
def test_a_killed_peer_is_left_and_the_weights_survive() -> None:
    with Ranks(2) as ranks:
        ranks.start(leave_a_killed_peer, timeout=100)
        ranks.wait_for("running/0", "running/1")
        ranks.kill(1)
        ranks.set("supervisor", "killed")
        took, _ = ranks.finish(100, may_die={1})
    assert took < 15


@needs_one
@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=needs_two)])
def test_generation_after_generation_in_one_process(world_size: int) -> None:
    with Ranks(world_size) as ranks:
        ranks.run(leave_and_form_again, timeout=150)


@needs_one
def test_an_environment_that_would_end_the_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    with pytest.raises(ConfigError, match="TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        form_backend("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1, device="cuda:0")
