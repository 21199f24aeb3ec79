"""Small parts of shardd: verdicts on errors, progress, identity, logs, notifications, GPU claims."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import torch

from shardd import environment, logging, systemd
from shardd.devices import DeviceError, claim_gpu, normalise
from shardd.errors import LoadCancelled, ModelError, UnknownModel, describe, judge, known
from shardd.identity import Identity, host_id
from shardd.progress import NEVER_MILLISECONDS, Progress
from tensor_parallel import errors as library

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code", "collective"),
    [
        (library.InvalidInput("x"), Code.INVALID_ARGUMENT, False),
        (library.CheckpointError("x"), Code.INVALID_ARGUMENT, False),
        (library.AccessDenied("x"), Code.PERMISSION_DENIED, False),
        (library.LoadCancelled("x"), Code.CANCELLED, False),
        (LoadCancelled("x"), Code.CANCELLED, False),
        (library.PlanError("x"), Code.FAILED_PRECONDITION, False),
        (library.NotPortable("x"), Code.FAILED_PRECONDITION, False),
        (library.DoesNotFit("x"), Code.FAILED_PRECONDITION, False),
        (library.PeerLost("x"), Code.UNAVAILABLE, True),
        (library.CollectiveAborted("x"), Code.UNAVAILABLE, True),
        (library.CollectiveTimeout("x"), Code.UNAVAILABLE, True),
        (library.GroupUnbound("x"), Code.UNAVAILABLE, True),
        (torch.OutOfMemoryError("x"), Code.RESOURCE_EXHAUSTED, False),
        (MemoryError("x"), Code.RESOURCE_EXHAUSTED, False),
        (UnknownModel("x"), Code.NOT_FOUND, False),
        (ModelError("x"), Code.INVALID_ARGUMENT, False),
        (RuntimeError("anything"), Code.INTERNAL, False),
    ],
)
def test_verdicts(error: Exception, code: grpc.StatusCode, collective: bool) -> None:
    verdict = judge(error)
    assert (verdict.code, verdict.collective) == (code, collective)
    assert verdict.ours is (code is Code.INTERNAL)


def test_every_library_error_is_known() -> None:
    kinds = [kind for kind in vars(library).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    unknown = [kind.__name__ for kind in kinds if not known(kind("x"))]
    assert set(unknown) <= {"TensorParallelError", "NotInitialized"}


def test_torch_running_out_of_host_memory_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**46)
    assert judge(failed.value).code is Code.RESOURCE_EXHAUSTED


def test_model_errors_compare_by_what_the_model_raised() -> None:
    error = ModelError("the model raised ValueError: no")
    error.__cause__ = ValueError("no")
    assert judge(error).kind == "ValueError"


def test_descriptions_are_one_short_line() -> None:
    assert describe(RuntimeError("\n  first\nException raised from x")) == "first"
    assert describe(ValueError()) == "ValueError"
    assert len(describe(ValueError("y" * 10_000))) < 2100


class Stats:
    seconds = 0.0
    begun = 7
    now = 50.0


def test_progress_tells_slow_from_stuck() -> None:
    progress = Progress(lambda: Stats.seconds, lambda: Stats.begun, lambda: Stats.now)
    assert progress.since_collective_milliseconds() == NEVER_MILLISECONDS
    assert not progress.stuck(0.0)
    progress.begin()
    Stats.now += 10
    assert progress.busy_seconds() == 10
    assert progress.quiet_seconds() == 0
    assert progress.stuck(9)
    Stats.seconds += 0.5  # a collective has completed
    Stats.begun += 1
    assert not progress.stuck(9)
    Stats.now += 5
    assert progress.since_collective_milliseconds() == 5000
    progress.finish(forward=True)
    Stats.now += 2
    assert progress.quiet_seconds() == 2
    assert (progress.executed, progress.busy_seconds()) == (1, 0)
    assert progress.since_collective_milliseconds() == 7000
    assert progress.collectives() == 8
    progress.restart()
    assert (progress.executed, progress.collectives()) == (0, 0)


def test_identity() -> None:
    first, second = Identity(0, 2), Identity(0, 2)
    assert first.pid == os.getpid()
    assert first.incarnation != second.incarnation
    assert first.host_id == second.host_id == host_id()


def test_environment_for_torch() -> None:
    made = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    environment.prepare(made, threads=3, world_size=2, interface="eth7")
    assert made["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert made["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert (made["OMP_NUM_THREADS"], made["NCCL_SOCKET_IFNAME"]) == ("3", "eth7")
    told = {"OMP_NUM_THREADS": "5"}
    environment.prepare(told, threads=0, world_size=2, interface="")
    assert told["OMP_NUM_THREADS"] == "5"
    shared: dict[str, str] = {}
    environment.prepare(shared, threads=0, world_size=1, interface="")
    assert int(shared["OMP_NUM_THREADS"]) == environment.available_cores()
    assert "GLOO_SOCKET_IFNAME" not in shared
    assert environment.host_memory() > 2**28


def test_log_lines() -> None:
    out = io.StringIO()
    log = logging.configure("info", "json", rank=3, stream=out)
    log.debug("hidden")
    log.info("forward", model="m", request_id="r", generation=7, seconds=0.5)
    log.error("failed", exc_info=ValueError("why"))
    first, second = map(json.loads, out.getvalue().splitlines())
    assert list(first)[:8] == ["ts", "level", "event", "logger", "rank", "generation", "model", "request_id"]
    assert (first["rank"], first["logger"], first["event"]) == (3, "shardd", "forward")
    assert "why" in second["exception"]


def test_notifications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")  # outside systemd: nothing
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        systemd.notify("READY=1", "STATUS=here")
        assert manager.recv(100) == b"READY=1\nSTATUS=here"
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert systemd.watchdog_seconds() == 3.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_seconds() is None


def test_a_gpu_is_claimed_once_and_freed_with_its_process() -> None:
    uuid = normalise(f"GPU-TEST-{os.getpid()}")
    code = f"from shardd.devices import claim_gpu; held = claim_gpu({uuid!r}); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DeviceError, match="--allow-shared-gpu"):
            claim_gpu(uuid)
    finally:
        holder.kill()
        holder.communicate()
    claim_gpu(uuid).close()
