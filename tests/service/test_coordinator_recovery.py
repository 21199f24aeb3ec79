"""Ranks and coordinators die under load; nobody hangs, nothing is wrong, survivors keep their weights."""

import signal
import time

import grpc
import numpy as np
import pytest
import torch

from tests.service import shard_models
from tests.service.clusters import Caller, Cluster, CoordinatorProcess, failure
from tests.service.daemons import wait_for
from tests.service.load_generator import LoadGenerator

MLP = "tests.service.shard_models:mlp"
MOODY = "tests.service.shard_models:moody"
X = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def expected():
    with torch.no_grad():
        return shard_models.Mlp()(torch.from_numpy(X)).numpy()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One for all tests that leave it serving; those at the end of this file do not."""
    directory = tmp_path_factory.mktemp("recovery")
    with Cluster(2, directory, arguments=["--state-dir", f"{directory}/state", "--lease-ms", "1500"]) as cluster:
        cluster.load("m", MLP, kind="factory")
        cluster.load("moody", MOODY, kind="factory", batching={"max_joined_rows": 1})
        yield cluster


def traffic(cluster, **options):
    return LoadGenerator(cluster.coordinator.address, "m", {"x": X}, expected(), **options)


def test_a_killed_rank_is_told_at_once_and_its_replacement_serves(cluster):
    before = cluster.health()
    with traffic(cluster) as load:
        wait_for(lambda: load.answered_since(0) > 20, "traffic")
        killed = time.monotonic()
        cluster.daemons[1].kill()
        health = cluster.await_not_serving()
        assert "rank 1" in health.reason
        assert health.ranks[1].state == "LOST"
        assert not any(model.serving for model in health.models)
        cluster.daemons.restart(1)
        cluster.await_serving()
        back = time.monotonic()
        wait_for(lambda: load.answered_since(back) > 20, "traffic again")
    assert load.all_right()
    assert {outcome.code for outcome in load.failures} == {UNAVAILABLE}
    assert max(load.waited(killed), default=0) < 5  # told, not timed out; the benchmark gives the figure
    assert any("rank 1" in outcome.details for outcome in load.failures)
    after = cluster.health()
    assert (after.ranks[0].pid, after.ranks[0].loads) == (before.ranks[0].pid, before.ranks[0].loads)
    assert after.ranks[1].pid != before.ranks[1].pid
    assert after.ranks[1].restarts == before.ranks[1].restarts + 1
    assert after.generation > before.generation


def test_a_stopped_rank_is_found_and_touches_nothing_when_it_wakes(cluster):
    before = cluster.health()
    with traffic(cluster) as load:
        wait_for(lambda: load.answered_since(0) > 20, "traffic")
        cluster.daemons[0].signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert "rank 0" in cluster.await_not_serving().reason
        wait_for(lambda: load.failures, "the callers to be told")
        cluster.daemons[0].signal(signal.SIGCONT)
        cluster.await_serving()
        back = time.monotonic()
        wait_for(lambda: load.answered_since(back) > 20, "traffic again")
    assert load.all_right()
    assert {outcome.code for outcome in load.failures} == {UNAVAILABLE}
    assert max(load.waited(stopped), default=0) < 10
    assert loads(cluster.health()) == loads(before)


def loads(health):
    return [rank.loads for rank in health.ranks]


def test_a_killed_coordinator_comes_back_to_loaded_daemons(cluster):
    before = cluster.health()
    cluster.restart_coordinator()
    after = cluster.await_serving()
    np.testing.assert_allclose(cluster.forward("m", {"x": X})["output"], expected(), rtol=1e-5, atol=1e-6)
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks]
    assert loads(after) == loads(before)
    assert after.coordinator.owner == before.coordinator.owner  # or it would wait for its own lease
    assert after.coordinator.pid != before.coordinator.pid


def test_without_a_state_file_what_is_active_is_adopted(tmp_path):
    boot = ["--load", f"boot={MLP}", "--load", "gone=no/such/model"]
    with Cluster(2, tmp_path, arguments=["--lease-ms", "1000", *boot], await_serving=False) as cluster:
        wait_for(lambda: by_name(cluster)["boot"].serving, "the model named at the start")
        wait_for(lambda: "no/such/model" in by_name(cluster)["gone"].reason, "what is wrong with the other")
        assert "no/such/model" in cluster.health().reason
        assert failure(lambda: cluster.forward("gone", {"x": X})).code() is grpc.StatusCode.FAILED_PRECONDITION
        cluster.load("m", MLP, kind="factory", version="7")
        cluster.arguments = ["--lease-ms", "1000"]
        cluster.restart_coordinator()
        health = cluster.await_serving()
        assert [(model.name, model.version) for model in health.models] == [("boot", "1"), ("m", "7")]
        assert [rank.loads for rank in health.ranks] == [2, 2]
        assert cluster.load("m", MLP, kind="factory")[-1].version == "8"


def by_name(cluster):
    return {model.name: model for model in cluster.health().models}


def test_after_everything_was_killed_the_desired_state_comes_back(cluster):
    cluster.coordinator.kill()
    for rank in (0, 1):
        cluster.daemons[rank].kill()
    for rank in (0, 1):
        cluster.daemons.restart(rank)
    cluster.restart_coordinator()
    health = cluster.await_serving()
    assert [model.name for model in health.models] == ["m", "moody"]
    np.testing.assert_allclose(cluster.forward("m", {"x": X})["output"], expected(), rtol=1e-5, atol=1e-6)


def test_one_rank_out_of_memory_fails_its_request_and_service_returns(cluster):
    before = cluster.health()
    x = X.copy()
    x[0, 0] = shard_models.MEMORY_ONE
    error = failure(lambda: cluster.forward("moody", {"x": x}))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "rank 1 failed alone" in error.details()
    assert "retry-after-ms" not in dict(error.trailing_metadata())
    cluster.await_serving()
    np.testing.assert_allclose(cluster.forward("m", {"x": X})["output"], expected(), rtol=1e-5, atol=1e-6)
    assert loads(cluster.health()) == loads(before)


def test_a_forward_that_hangs_ends_at_its_bound(tmp_path):
    arguments = ["--forward-bound-seconds", "1", "--lease-ms", "1500"]
    with Cluster(2, tmp_path, arguments=arguments) as cluster:
        cluster.load("moody", MOODY, kind="factory", batching={"max_joined_rows": 1})
        x = X.copy()
        x[0, 0] = shard_models.SLEEP
        error = failure(lambda: cluster.forward("moody", {"x": x}))
        assert error.code() is UNAVAILABLE
        assert "has not finished the forward of moody@1 within 1 s" in error.details()


# ---- those that leave the coordinator dead or standing by


def test_two_coordinators_under_load_settle_on_one(cluster, tmp_path):
    (tmp_path / "other").mkdir()
    rival = CoordinatorProcess(cluster.daemons.addresses, tmp_path / "other", arguments=["--lease-ms", "1500"])
    caller = None
    try:
        caller = Caller(rival.await_address())
        wait_for(lambda: caller.health().coordinator.state == "STANDBY", "the rival to stand by")
        generation, before = cluster.health().generation, loads(cluster.health())
        with traffic(cluster) as load, LoadGenerator(rival.address, "m", {"x": X}, expected()) as refused:
            wait_for(lambda: load.answered_since(0) > 100 and len(refused.outcomes) > 50, "traffic to both")
        assert not load.failures
        assert {outcome.code for outcome in refused.outcomes} == {UNAVAILABLE}
        assert cluster.coordinator.address in refused.outcomes[-1].details  # it says who owns the ranks
        assert cluster.health().generation == generation
        assert not caller.health().serving
        cluster.coordinator.kill()
        wait_for(lambda: caller.health().serving, "the rival to take over")
        np.testing.assert_allclose(caller.forward("m", {"x": X})["output"], expected(), rtol=1e-5, atol=1e-6)
        assert loads(caller.health()) == before
        cluster.coordinator = cluster.start_coordinator(cluster.coordinator.address)
        cluster.coordinator.await_address()
        wait_for(lambda: cluster.health().coordinator.state == "STANDBY", "the first to stand by")
        assert caller.health().generation == generation + 1
    finally:
        if caller is not None:
            caller.close()
        rival.close()


def test_a_wrong_order_of_daemons_is_explained(cluster, tmp_path):
    (tmp_path / "wrong").mkdir()
    cluster.coordinator.kill()
    wrong = CoordinatorProcess(cluster.daemons.addresses[::-1], tmp_path / "wrong")
    try:
        caller = Caller(wrong.await_address())
        reason = wait_for(lambda: r if "was given as rank" in (r := caller.health().reason) else "", "the reason")
        assert "is rank 1 of 2, but was given as rank 0 of 2" in reason
        caller.close()
    finally:
        wrong.close()
