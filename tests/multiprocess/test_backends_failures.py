"""What happens to collectives when ranks die, stop, give up or never come. Real processes, real signals."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from tensor_parallel.backends.shm_library import load_library
from tensor_parallel.backends.shm_pure import usable
from tensor_parallel.errors import CollectiveAborted, CollectiveError, CollectiveTimeout, PeerLost
from tests.multiprocess.ranks import Place, Ranks, on_ranks

needs_library = pytest.mark.skipif(load_library() is None, reason="the compiled part is not built on this machine")
needs_x86 = pytest.mark.skipif(not usable(), reason="the part in Python is for x86-64 only")
KINDS = [
    pytest.param("gloo"),
    pytest.param("shm", marks=needs_library),
    pytest.param("pure", marks=needs_x86),
]
LONG = timedelta(seconds=60)  # far beyond any test: who returns earlier noticed by itself


def loop_until_failure(place: Place, kind: str) -> tuple[str, str, float]:
    """All-reduce for ever; what ended it, and when (wall clock, comparable between processes)."""
    backend = place.form(kind, timeout=LONG)
    place.store().set(f"running/{place.rank}", "1")
    try:
        while True:
            backend.all_reduce_sum_(torch.ones(5000))
    except CollectiveError as error:
        return type(error).__name__, str(error), time.time()
    finally:
        backend.close()


def loop_until_aborted_by_supervisor(place: Place, kind: str, stopped: int, delay: float) -> tuple[str, float, float]:
    """As a daemon does: the executor is stuck in a collective, another thread is told that a peer is lost."""
    backend = place.form(kind, timeout=LONG)
    if place.rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    aborted_at: list[float] = []

    def supervise() -> None:
        aborted_at.append(time.monotonic())
        backend.abort("told that a peer is lost")

    timer = threading.Timer(delay, supervise)
    timer.start()
    try:
        while True:
            backend.all_reduce_sum_(torch.ones(100))
    except CollectiveError as error:
        elapsed = time.monotonic() - aborted_at[0] if aborted_at else -1.0
        return f"{type(error).__name__}: {error}", elapsed, 0.0
    finally:
        place.store().set(f"left/{place.rank}", "1")
        timer.join()
        backend.close()


def blocked_alone(place: Place, kind: str) -> str:
    """Rank 0 waits for peers that never call; one abort frees it, and the peers' next call fails."""
    backend = place.form(kind, timeout=LONG)
    store = place.store("blocked")
    if place.rank == 0:
        threading.Timer(0.1, backend.abort, ["enough"]).start()
    else:
        store.wait(["freed"], timedelta(seconds=20))
    start = time.monotonic()
    with pytest.raises((CollectiveAborted, PeerLost)) as caught:
        backend.all_reduce_sum_(torch.ones(3))
    assert time.monotonic() - start < 5
    if place.rank == 0:
        assert caught.type is CollectiveAborted
        assert "enough" in str(caught.value)
        store.set("freed", "1")
    with pytest.raises(CollectiveError):
        backend.barrier()
    backend.close()
    backend.close()
    backend.abort("after closing, nothing happens")
    return str(caught.value)


def close_while_blocked(place: Place, kind: str) -> None:
    """Closing from another thread must free the executor and not pull memory from under it."""
    backend = place.form(kind, timeout=LONG)
    store = place.store("closing")
    if place.rank == 0:
        threading.Timer(0.1, lambda: (backend.abort("closing"), backend.close())).start()
        with pytest.raises(CollectiveError):
            backend.barrier()
        store.set("closed", "1")
    store.wait(["closed"], timedelta(seconds=20))
    backend.close()
    with pytest.raises(CollectiveAborted, match="clos"):
        backend.barrier()


def one_rank_is_late(place: Place, kind: str) -> str:
    backend = place.form(kind, timeout=timedelta(seconds=0.5))
    store = place.store("late")
    if place.rank == 1:
        store.wait(["timed out"], timedelta(seconds=20))
        backend.close()
        return "late"
    with pytest.raises(CollectiveTimeout) as caught:
        backend.all_reduce_sum_(torch.ones(3))
    store.set("timed out", "1")
    backend.close()
    return str(caught.value)


def one_rank_never_comes(place: Place, kind: str) -> str:
    if place.rank == 1:
        return "absent"
    with pytest.raises((CollectiveTimeout, PeerLost)) as caught:
        place.form(kind, timeout=timedelta(seconds=0.5))
    return str(caught.value)


def leaves_in_good_order(place: Place) -> float:
    """A rank that closes after the last collective must not fail a peer that is still inside it."""
    for turn in range(50):
        backend = place.form("shm", f"turn{turn}")
        result = float(backend.all_reduce_sum_(torch.ones(60_000))[-1])
        backend.broadcast_(torch.ones(10), turn % place.world_size)
        backend.close()
    return result


def _footprint() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def form_many_times(place: Place, kind: str, times: int) -> dict[str, tuple[int, int]]:
    """Descriptors, threads and memory after a few generations, and after many."""
    memory: list[int] = []
    footprints: list[tuple[int, int]] = []
    for turn in range(times):
        backend = place.form(kind, f"g{turn}")
        backend.all_reduce_sum_(torch.ones(100))
        backend.close()
        del backend
        if turn in (times // 4, times - 1):
            footprints.append(_footprint())
            memory.append(psutil.Process().memory_info().rss)
    return {"first": footprints[0], "last": footprints[1], "grown": (memory[1] - memory[0], 0)}


@pytest.mark.parametrize("kind", KINDS)
def test_killing_one_of_three_ranks_fails_the_others_promptly(kind: str) -> None:
    with Ranks(3) as ranks:
        ranks.start(loop_until_failure, kind, timeout=30)
        ranks.wait_for("running/0", "running/1", "running/2")
        killed_at = time.time()
        ranks.kill(2)
        results = ranks.finish(30, may_die={2})
    assert results[2] is None
    for name, message, failed_at in results[:2]:
        assert name in ("PeerLost", "CollectiveAborted"), message
        assert failed_at - killed_at < 5
    if kind != "gloo":
        assert all("rank 2" in message for _, message, _ in results[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_peer_is_left_by_aborting_from_another_thread(kind: str) -> None:
    with Ranks(3) as ranks:
        ranks.start(loop_until_aborted_by_supervisor, kind, 2, 0.3, timeout=30)
        ranks.wait_for("left/0", "left/1")
        assert psutil.Process(ranks.pids[2]).status() == psutil.STATUS_STOPPED
        ranks.kill(2)  # so that the run can end
        results = ranks.finish(30, may_die={2})
    for message, elapsed, _ in results[:2]:
        assert message.startswith(("CollectiveAborted", "PeerLost")), message
        assert elapsed < 5


@pytest.mark.parametrize("kind", KINDS)
def test_one_abort_frees_a_blocked_rank_and_fails_its_peers(kind: str) -> None:
    with Ranks(3) as ranks:
        ranks.run(blocked_alone, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_while_another_thread_is_blocked(kind: str) -> None:
    with Ranks(2) as ranks:
        ranks.run(close_while_blocked, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_rank_is_a_timeout(kind: str) -> None:
    message = on_ranks(2, one_rank_is_late, kind)[0]
    assert "gloo" in message or kind != "gloo"
    if kind != "gloo":
        assert "rank 1 did not take part" in message


@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_forming_without_a_peer_ends_in_time(kind: str) -> None:
    with Ranks(2) as ranks:
        assert ranks.run(one_rank_never_comes, kind, timeout=15)[1] == "absent"


@needs_library
def test_a_rank_that_closes_early_fails_nobody() -> None:
    assert on_ranks(3, leaves_in_good_order) == [3.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_forming_two_hundred_times_leaks_nothing(kind: str) -> None:
    for report in on_ranks(2, form_many_times, kind, 200, timeout=50):
        assert report["last"] == report["first"]
        assert report["grown"][0] < 32 << 20


@needs_library
def test_nothing_is_left_when_all_ranks_are_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    with Ranks(2) as ranks:
        ranks.start(loop_until_failure, "shm", timeout=30)
        ranks.wait_for("running/0", "running/1")
        for rank in range(2):
            ranks.kill(rank)
        ranks.finish(30, may_die={0, 1})
    left = {name for name in set(os.listdir("/dev/shm")) - before if "tensor-parallel" in name}
    assert not left


def test_the_compiled_part_compiles_without_warnings(tmp_path: Path) -> None:
    compiler = os.environ.get("CC", "cc")
    if subprocess.run(["which", compiler], capture_output=True).returncode:
        pytest.skip("no C compiler on this machine")
    source = Path(sys.modules["tensor_parallel"].__file__ or "").parent / "backends" / "_shm.c"
    options = ["-std=c11", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([compiler, *options, "-o", tmp_path / "_shm.so", source], check=True, timeout=60)
