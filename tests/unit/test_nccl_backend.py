"""The NCCL backend's own part, over a stand-in for torch's process group: tests/gpu has the real one."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import HashStore

from tensor_parallel.backends import nccl
from tensor_parallel.backends.nccl import NcclBackend
from tensor_parallel.errors import AbortStuck, CollectiveAborted, CollectiveTimeout, PeerLost
from tensor_parallel.nccl_environment import NCCL_ENVIRONMENT

DEVICE = torch.device("cuda", 3)


class Work:
    def wait(self) -> bool:
        return True


class StandIn:
    """As much of ``ProcessGroupNCCL`` as is used: its calls return at once, unless told to wait for ``let_go``."""

    class Options:
        def __init__(self) -> None:
            self.config = type("Config", (), {"blocking": -1})()

    made: list[StandIn]
    connect: Any = staticmethod(lambda: None)
    reduce: Any = staticmethod(lambda: None)
    end: Any = staticmethod(lambda: None)

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self.options, self.connected, self.calls = options, None, []
        self.made.append(self)

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.connect()
        self.connected = device

    def allreduce(self, tensors: list[torch.Tensor]) -> Work:
        self.calls.append("begin")
        self.reduce()
        self.calls.append("queued")
        return Work()

    def abort(self) -> None:
        self.calls.append("abort")
        self.end()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    kind = type("StandIn", (StandIn,), {"made": []})
    monkeypatch.setattr(c10d, "ProcessGroupNCCL", kind, raising=False)
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    kind.device = staticmethod(lambda: getattr(current, "device", None))
    for name, value in NCCL_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return kind


def form(store: Any = None, rank: int = 0, world_size: int = 1, seconds: float = 5.0) -> NcclBackend:
    return NcclBackend(store or HashStore(), rank, world_size, DEVICE, timedelta(seconds=seconds))


def test_it_is_connected_on_its_own_device_when_it_is_there(stand_in: Any) -> None:
    devices = []
    stand_in.connect = staticmethod(lambda: devices.append(stand_in.device()))
    form()
    assert stand_in.device() == DEVICE  # of the caller's thread too: what it computes next is on that device
    assert devices == [DEVICE]
    assert stand_in.made[0].connected == DEVICE
    assert stand_in.made[0].options.config.blocking == 1
    assert stand_in.made[0].options._timeout == timedelta(seconds=5)


def test_a_peer_that_never_comes_is_waited_for_without_nccl(stand_in: Any) -> None:
    with pytest.raises(CollectiveTimeout, match="arrived/1"):
        form(world_size=2, seconds=0.1)
    assert not stand_in.made


def test_peers_that_have_come_form(stand_in: Any) -> None:
    store = HashStore()
    store.set("arrived/1", "1")
    assert form(store, world_size=2).world_size == 2


def test_forming_that_hangs_is_left_behind(stand_in: Any) -> None:
    let_go = threading.Event()
    stand_in.connect = staticmethod(let_go.wait)
    with pytest.raises(CollectiveTimeout, match="rank 0 of 1 could not form an NCCL group on cuda:3: a peer"):
        form(seconds=0.1)
    let_go.set()


def test_forming_that_fails_says_why(stand_in: Any) -> None:
    def fail() -> None:
        raise RuntimeError("NCCL error: remote process exited\nand a long trace")

    stand_in.connect = staticmethod(fail)
    with pytest.raises(PeerLost, match=r"could not form an NCCL group on cuda:3: NCCL error: remote process exited$"):
        form()


def test_nothing_is_queued_after_an_abort(stand_in: Any) -> None:
    backend = form()
    backend.abort("a peer is lost")
    with pytest.raises(CollectiveAborted, match="a peer is lost"):
        backend.all_reduce_sum_(torch.ones(2))
    assert stand_in.made[0].calls == ["abort"]


def test_an_abort_waits_for_what_is_being_queued(stand_in: Any) -> None:
    """NCCL frees a communicator that it aborts, also under a thread that is inside."""
    backend = form()
    inside, let_go = threading.Event(), threading.Event()
    stand_in.reduce = staticmethod(lambda: (inside.set(), let_go.wait(5)))
    worker = threading.Thread(target=lambda: backend.all_reduce_sum_(torch.ones(2)))
    worker.start()
    assert inside.wait(5)
    ending = threading.Thread(target=backend.abort, args=("a peer is lost",))
    ending.start()
    while backend._aborted is None:
        time.sleep(0.001)
    assert stand_in.made[0].calls == ["begin"]
    let_go.set()
    worker.join(5)
    ending.join(5)
    assert stand_in.made[0].calls == ["begin", "queued", "abort"]


def test_an_abort_does_not_wait_for_ever(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full launch queue behind a kernel that hangs: only the abort ends what the worker is inside of."""
    monkeypatch.setattr(nccl, "QUEUE_SECONDS", 0.05)
    backend = form()
    inside, ended = threading.Event(), threading.Event()
    stand_in.reduce = staticmethod(lambda: (inside.set(), ended.wait(5)))
    stand_in.end = staticmethod(ended.set)
    worker = threading.Thread(target=lambda: backend.all_reduce_sum_(torch.ones(2)))
    worker.start()
    assert inside.wait(5)
    backend.abort("a peer is lost")
    worker.join(5)
    assert stand_in.made[0].calls == ["begin", "abort", "queued"]


def test_a_collective_that_raises_ends_the_generation(stand_in: Any) -> None:
    def fail() -> None:
        raise RuntimeError("unhandled cuda error")

    backend = form()
    stand_in.reduce = staticmethod(fail)
    with pytest.raises(PeerLost, match="unhandled cuda error"):
        backend.all_reduce_sum_(torch.ones(2))
    assert stand_in.made[0].calls == ["begin", "abort"]
    with pytest.raises(CollectiveAborted):
        backend.check()


def test_a_device_that_does_not_let_go_is_reported(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "ABORT_SECONDS", 0.05)
    let_go = threading.Event()
    stand_in.end = staticmethod(let_go.wait)
    with pytest.raises(AbortStuck, match=r"did not abort within 0\.05 s"):
        form().abort("a peer is lost")
    let_go.set()
