"""Nobody asks for anything, and a rank goes wrong: the idle collective finds it, health names it, service returns."""

import json

import numpy as np
import pytest
import torch

from shardd.errors import EXIT_STUCK
from tests.service import shard_models
from tests.service.clusters import Cluster
from tests.service.daemons import wait_for

SABOTAGED = "tests.service.shard_models:sabotaged"
X = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)


@pytest.fixture
def expected():
    with torch.no_grad():
        return shard_models.Mlp()(torch.from_numpy(X)).numpy()


@pytest.fixture(scope="module")
def flag(tmp_path_factory):
    return tmp_path_factory.mktemp("flag") / "flag"


@pytest.fixture(scope="module", params=["gloo", "shm"])
def cluster(request, tmp_path_factory, flag):
    arguments = {"arguments": ["--probe-bound-seconds", "1.5"], "daemon_arguments": ["--backend", request.param]}
    arguments["daemon_arguments"] += ["--fence-seconds", "1"]
    with Cluster(2, tmp_path_factory.mktemp(request.param), **arguments) as cluster:
        cluster.load("m", SABOTAGED, kind="factory", arguments_json=json.dumps({"flag": str(flag)}))
        yield cluster


def serves(cluster):
    """Health once it serves; until then whoever is dead is replaced, as a supervisor would."""
    for rank, daemon in enumerate(cluster.daemons):
        if not daemon.alive:
            cluster.daemons.restart(rank)
    health = cluster.health()
    return health if health.serving else None


def check_answer(cluster, expected):
    np.testing.assert_allclose(cluster.forward("m", {"x": X})["output"], expected, rtol=1e-5, atol=1e-6)


def test_ranks_that_disagree_on_a_size_end_their_generation_and_nothing_else(cluster, flag, expected):
    """No answer of such a generation is used. gloo may take a process down with it; then that is replaced."""
    before = cluster.await_serving()
    flag.write_text("1000000")
    cluster.await_not_serving()
    flag.unlink()
    after = wait_for(lambda: serves(cluster), "service to return")
    check_answer(cluster, expected)
    assert after.generation > before.generation


def test_an_idle_executor_that_hangs_is_named_and_replaced(cluster, flag, expected):
    before = wait_for(lambda: serves(cluster), "the cluster to serve")
    flag.write_text("hang")
    health = cluster.await_not_serving()
    assert "rank 1 has not finished the health probe" in health.reason
    assert not any(model.serving for model in health.models)
    assert health.ranks[1].state == "READY"  # it answers heartbeats: they alone would not have told
    assert cluster.daemons[1].wait(30) == EXIT_STUCK  # nothing frees a thread that sleeps
    flag.unlink()
    cluster.daemons.restart(1)
    after = cluster.await_serving()
    check_answer(cluster, expected)
    assert (after.ranks[0].pid, after.ranks[0].loads) == (before.ranks[0].pid, before.ranks[0].loads)
    assert after.generation > before.generation
    assert any(event["rank"] == 1 for event in cluster.coordinator.events("generation_broken"))
