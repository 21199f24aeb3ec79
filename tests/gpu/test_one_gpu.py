"""What one GPU is enough for: loading, serving, memory, the arena, ranks that share it, a device that fails."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.client import Client, RequestError
from protos.tensor_parallel.v1 import shard_pb2, tensor_pb2
from shardd.arena import Arena, copy_into, layout, new_segment
from shardd.tensors import to_host
from tensor_parallel import DistributedModelWrapper
from tensor_parallel.backends import form_backend
from tensor_parallel.checkpoint import open_source
from tensor_parallel.checkpoint.memory import available_bytes, give_back_freed
from tensor_parallel.group import Group
from tensor_parallel.serving import ServedModel, load_model
from tests import checkpoints
from tests.gpu.models import table
from tests.multiprocess.ranks import Place, Ranks
from tests.service.cluster import cluster, until
from tests.service.shard_client import sealed_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(240),
]
GPU = torch.device("cuda", 0)
TABLE = "tests.gpu.models:table"
MODELS = (checkpoints.bert, checkpoints.llama, checkpoints.t5, checkpoints.mixtral)


def load(path: Path, device: torch.device, rank: int = 0, group: Group | None = None) -> ServedModel:
    group = group or Group(0, 1)
    return load_model(open_source(path), world_size=group.world_size, rank=rank, device=device, group=group)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Up to the order of sums, which differs between kernels, in the precision of the values."""
    wide = want.float()
    slack = 1e-4 if want.dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    return torch.allclose(got.cpu().float(), wide, rtol=10 * slack, atol=slack * max(1.0, float(wide.abs().max())))


@pytest.mark.parametrize("save", MODELS)
def test_a_model_computes_there_what_it_does_on_the_cpu(save, tmp_path) -> None:
    path = save(tmp_path)
    inputs = open_source(path).example_inputs()
    want = load(path, torch.device("cpu")).run(inputs)
    model = load(path, GPU)
    before = model.checksum()
    got = model.run(inputs)
    assert got.keys() == want.keys()
    assert {value.device for value in got.values()} == {GPU}
    assert all(close(got[name], want[name]) for name in want)
    for host, value in zip(to_host(list(got.values())), got.values(), strict=True):
        assert host.is_pinned()
        assert torch.equal(host, value.cpu())
    assert model.checksum() == before
    assert model.peak_bytes >= model.bytes_held


def test_memory_of_a_model_that_is_gone_is_there_for_the_next(tmp_path) -> None:
    path = checkpoints.llama(tmp_path)
    model = load(path, GPU)
    filler = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    held = available_bytes(GPU)
    del model, filler
    give_back_freed()
    assert available_bytes(GPU) >= held + (1 << 30)


def test_the_arena_is_pinned_and_carries_values_both_ways() -> None:
    descriptor = sealed_memory(1 << 20)
    arena = Arena(GPU)
    arena.add(descriptor)
    spec = tensor_pb2.Tensor(name="x", dtype=tensor_pb2.DataType.Value("FLOAT32"), shape=[256])
    values = {"a": torch.arange(256.0, device=GPU), "b": torch.ones(3, 5, device=GPU).t()}
    refs = arena.place(values, shard_pb2.ArenaRef(offset=64, byte_size=1 << 16, segment=0))
    view = arena.input(spec, refs[0])
    assert view.is_pinned()
    assert torch.equal(view.to(GPU, non_blocking=True), values["a"])
    del view
    arena.release()
    assert torch.equal(torch.ones(4, device=GPU).cpu(), torch.ones(4))  # no error was left for the next kernel
    refs, size = layout(values, 0, 0)
    other, memory = new_segment(size)
    os.close(other)
    copy_into(memory, values, refs)
    assert torch.equal(torch.frombuffer(memory, dtype=torch.float32, count=256), values["a"].cpu())


def test_what_another_thread_computes_is_waited_for() -> None:
    """The executor is not the thread that chose the device."""
    results: list[torch.Tensor] = []

    def work() -> None:
        torch.cuda.set_device(GPU)
        big = torch.ones(4096, 4096, device=GPU)
        for _ in range(20):
            big = big @ big / 4096
        results.extend(to_host([big]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert torch.equal(results[0], torch.ones(4096, 4096))


def shares(place: Place, path: Path) -> None:
    """A rank of several on one GPU: served and wrapped, against the whole model."""
    backend = form_backend(
        "gloo", store=place.store("shared"), rank=place.rank, world_size=place.world_size, device=GPU
    )
    group = Group(place.rank, place.world_size, backend)
    inputs = open_source(path).example_inputs()
    want = load(path, torch.device("cpu")).run(inputs)
    served = load(path, GPU, place.rank, group)
    got = served.run(inputs)
    for spec in served.outputs:
        index = slice(None) if spec.shard is None or spec.shard.dim is None else spec.shard.index(place.rank)
        whole = want[spec.name]
        part = whole if isinstance(index, slice) else whole.index_select(spec.shard.dim, index)
        assert close(got[spec.name], part)
    model, example = table()
    want_rows = model(**example)
    wrapped = DistributedModelWrapper(
        model.to(GPU), world_size=place.world_size, rank=place.rank, example_inputs=example, group=group
    )
    assert wrapped.plan.mode == "graph"
    assert close(wrapped(**{name: value.to(GPU) for name, value in example.items()}).detach(), want_rows.detach())
    backend.close()


@pytest.mark.parametrize("save", [checkpoints.llama, checkpoints.bert])
def test_ranks_that_share_a_gpu(save, tmp_path) -> None:
    with Ranks(2) as ranks:
        ranks.run(partial(shares, path=save(tmp_path)), timeout=150)


def serving(client: Client) -> dict | None:
    try:
        health = client.health(timeout=2)
    except RequestError:
        return None
    return health if health["serving"] else None


@pytest.fixture(params=[1, 2], ids=["one-rank", "two-ranks"])
def running(request, tmp_path):
    log = tmp_path / "log"
    shared = ["--allow-shared-gpu"] if request.param > torch.cuda.device_count() else []
    with cluster(
        "--device", "cuda", *shared, "--load", f"t={TABLE}", log=log, ranks=request.param, factories=(TABLE,)
    ) as up:
        yield up


def asked(row: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)
    inputs = {"x": x, "row": np.full(2, row)}
    with torch.no_grad():
        want = table()[0](torch.from_numpy(x), torch.from_numpy(inputs["row"])).numpy()
    return inputs, want


def test_a_cluster_on_the_gpu_outlives_a_rank(running) -> None:
    with Client(running.target, retries=True, timeout=60) as client:
        inputs, want = asked(3)
        np.testing.assert_allclose(client.forward("t", inputs)["output"], want, rtol=1e-3, atol=1e-4)
        before = serving(client)
        assert all(rank["device"].startswith("cuda") for rank in before["ranks"])
        os.kill(before["ranks"][-1]["pid"], signal.SIGKILL)
        np.testing.assert_allclose(client.forward("t", inputs)["output"], want, rtol=1e-3, atol=1e-4)
        after = until(lambda: serving(client), "it serves again", 60)
        for was, now in zip(before["ranks"][:-1], after["ranks"][:-1], strict=True):
            assert (was["pid"], was["loads"]) == (now["pid"], now["loads"])


def test_a_request_that_breaks_the_device_costs_a_restart_and_no_more(running) -> None:
    """An index that no check sees ends the CUDA context: daemons with one that is dead must not go on."""
    with Client(running.target, retries=0, timeout=60) as client:
        before = serving(client)
        with pytest.raises(RequestError):
            client.forward("t", asked(0)[0] | {"row": np.full(2, 1000)})
    with Client(running.target, retries=True, timeout=120) as client:
        until(
            lambda: (now := serving(client)) and now["ranks"][0]["pid"] != before["ranks"][0]["pid"], "new daemons", 90
        )
        inputs, want = asked(3)
        np.testing.assert_allclose(client.forward("t", inputs)["output"], want, rtol=1e-3, atol=1e-4)
