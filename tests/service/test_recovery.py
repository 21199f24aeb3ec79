"""A rank that is told to go leaves in order; a connection given up is no cancelled caller; ranks made of a spare."""

import contextlib
import os
import signal
import time
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from coordinator.client import Client, RequestError
from tests.service.cluster import FACTORIES, cluster, events, until
from tests.service.clusters import Cluster, failure
from tests.service.daemons import wait_for
from tests.service.load_generator import LoadGenerator
from tests.service.test_coordinator_recovery import MLP, UNAVAILABLE, X, expected, loads

pytestmark = pytest.mark.timeout(150)


# ---- daemons and a coordinator without a supervisor


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    # A rank that waited for its callers to fall silent would outlast this file.
    directory = tmp_path_factory.mktemp("draining")
    with Cluster(2, directory, daemon_arguments=["--drain-seconds", "600"]) as cluster:
        cluster.load("m", MLP, kind="factory")
        yield cluster


def test_a_rank_told_to_stop_leaves_at_once_under_load(ranks):
    before = ranks.health()
    with LoadGenerator(ranks.coordinator.address, "m", {"x": X}, expected()) as load:
        wait_for(lambda: load.answered_since(0) > 20, "traffic")
        assert ranks.daemons[1].stop() == 0
        wait_for(lambda: load.failures, "the callers to be told")
        ranks.daemons.restart(1)
        ranks.await_serving()
        back = time.monotonic()
        wait_for(lambda: load.answered_since(back) > 20, "traffic again")
    assert load.all_right()
    assert {outcome.code for outcome in load.failures} == {UNAVAILABLE}
    assert any("rank 1 is draining" in outcome.details for outcome in load.failures)
    ended = ranks.coordinator.events("generation_broken")
    broken = [event for event in ended if event["generation"] == before.generation]
    assert [event["reason"] for event in broken] == ["rank 1 is draining"]  # no rank was lost: it left in order
    assert not ranks.daemons[0].events("command_failed")
    assert (ranks.health().ranks[0].pid, loads(ranks.health())[0]) == (before.ranks[0].pid, loads(before)[0])


def test_a_load_at_a_rank_that_falls_silent_is_answered(ranks):
    ranks.daemons[0].signal(signal.SIGSTOP)
    try:
        # The connection is given up after some silent heartbeats, and with it the call of the load.
        error = failure(lambda: ranks.load("other", MLP, kind="factory", timeout=40))
    finally:
        ranks.daemons[0].signal(signal.SIGCONT)
    assert error.code() in (UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION), error.details()
    ranks.await_serving()
    ranks.load("other", MLP, kind="factory")


# ---- a supervised cluster, whose ranks are made of a spare


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("spare") / "log"


@pytest.fixture(scope="module")
def running(log):
    with cluster("--load", f"mlp={FACTORIES[0]}", log=log) as found:
        yield found


def serving(running) -> dict:
    def probe():
        with Client(running.target) as client, contextlib.suppress(RequestError):
            health = client.health(timeout=2)
            return health if health["serving"] else None

    return until(probe, "the cluster serves")


def spare_pid(log) -> int:
    return until(lambda: [event["pid"] for event in events(log, "spare_ready")], "a spare")[-1]


def replaced(running, rank: int, how: signal.Signals) -> dict:
    """The health after ``rank`` was ended and replaced."""
    pid = serving(running)["ranks"][rank]["pid"]
    os.kill(pid, how)
    return until(lambda: (h := serving(running))["ranks"][rank]["pid"] != pid and h, "a replacement")


def test_ranks_are_forked_children_of_the_supervisor(running, log):
    spare = psutil.Process(spare_pid(log))
    for rank in serving(running)["ranks"]:
        process = psutil.Process(rank["pid"])
        assert process.ppid() == running.process.pid  # collected, signalled and ended like any other child
        assert os.getpgid(process.pid) == process.pid
        assert process.cmdline()[:3] == ["shardd", "--rank", str(rank["rank"])]
        assert process.create_time() >= spare.create_time()
    until(lambda: spare.num_threads() == 1, "what it imports in a quiet moment")
    assert spare.cmdline()[0] == "shardd: spare"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_a_replacement_made_of_the_spare_serves(running, log, how):
    spare = spare_pid(log)
    before = serving(running)
    after = replaced(running, 1, how)
    assert after["ranks"][0]["pid"] == before["ranks"][0]["pid"]
    assert psutil.Process(after["ranks"][1]["pid"]).create_time() > psutil.Process(spare).create_time()
    assert spare_pid(log) == spare  # one spare makes any number of ranks
    with Client(running.target, retries=True) as client:
        np.testing.assert_allclose(client.forward("mlp", {"x": X})["output"], expected(), rtol=1e-5, atol=1e-6)


def test_a_spare_left_alone_imports_what_only_some_models_need(running, log):
    """Not before the ranks are made, so a replacement's first Hugging Face model need not wait for that."""
    assert serving(running)
    maps = Path(f"/proc/{spare_pid(log)}/maps")
    until(lambda: "/regex/" in maps.read_text(), "a library that transformers brings", bound=60)
    replaced(running, 1, signal.SIGKILL)


def test_without_its_spare_a_rank_is_started_from_nothing(running, log):
    gone = spare_pid(log)
    os.kill(gone, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(gone), "the spare is reaped")
    after = replaced(running, 0, signal.SIGKILL)
    process = psutil.Process(after["ranks"][0]["pid"])
    assert process.ppid() == running.process.pid
    until(lambda: spare_pid(log) != gone, "another spare")


def test_a_coordinator_told_to_stop_comes_back_at_its_address(running):
    before = serving(running)
    os.kill(before["coordinator"]["pid"], signal.SIGTERM)
    with Client(running.target, retries=True, timeout=40) as client:
        until(lambda: serving(running)["coordinator"]["pid"] != before["coordinator"]["pid"], "a successor")
        np.testing.assert_allclose(client.forward("mlp", {"x": X})["output"], expected(), rtol=1e-5, atol=1e-6)
    assert [rank["pid"] for rank in serving(running)["ranks"]] == [rank["pid"] for rank in before["ranks"]]


def test_nothing_outlives_a_killed_supervisor(running, log):
    spare = spare_pid(log)
    pids = [spare, *(rank["pid"] for rank in replaced(running, 1, signal.SIGKILL)["ranks"])]
    running.process.kill()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "all children are gone")
