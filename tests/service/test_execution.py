"""``execution="compile"`` in a real cluster: the same answers, through the death of a rank; and refused as a whole."""

from __future__ import annotations

import subprocess
import sys

import grpc
import numpy as np
import pytest
import torch

from coordinator.client import Client
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from tests.service import shard_models
from tests.service.clusters import Cluster, failure
from tests.service.daemons import wait_for
from tests.service.load_generator import LoadGenerator

pytestmark = pytest.mark.timeout(180)

GATED = "tests.service.shard_models:gated"
ROWS = 1536  # of 128 local columns: more elements than the smallest that run compiled
GENERATOR = np.random.default_rng(0)


def rows(count: int) -> np.ndarray:
    return GENERATOR.standard_normal((count, 64)).astype(np.float32)


def expected(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return shard_models.gated()[0](torch.from_numpy(x)).numpy()


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.allclose(got, want, rtol=1e-4, atol=1e-5))


def held(cluster: Cluster) -> list[str]:
    return [name for rank in cluster.health().ranks for name in rank.models]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    directory = tmp_path_factory.mktemp("execution")
    environment: dict[str, str] = {"OMP_NUM_THREADS": "1"}
    with Cluster(2, directory, env=environment, daemon_arguments=["--threads", "1"]) as cluster:
        cluster.environment = environment  # of daemons started from now on
        with Client(cluster.coordinator.address) as client:
            client.load("m", GATED, kind="factory", execution="compile", timeout=120)
        yield cluster


def compilations(cluster: Cluster, rank: int) -> int:
    """Loads by this rank's daemons, one after the other, that compiled something."""
    return sum(bool(event["functions_compiled"]) for event in cluster.daemons[rank].events("load_finished"))


def test_it_answers_as_the_model_does(cluster):
    assert [compilations(cluster, rank) for rank in (0, 1)] == [1, 1]
    for count in (1, 3, ROWS, 2 * ROWS):
        x = rows(count)
        assert close(cluster.forward("m", {"x": x})["output"], expected(x)), count


def test_it_survives_the_death_of_a_rank(cluster):
    before, x = cluster.health(), rows(ROWS)
    with LoadGenerator(cluster.coordinator.address, "m", {"x": x}, expected(x), clients=2) as load:
        wait_for(lambda: load.answered_since(0) > 10, "traffic")
        cluster.daemons[1].kill()
        cluster.await_not_serving()
        cluster.daemons.restart(1)
        cluster.await_serving()
        back = load.outcomes[-1].done
        wait_for(lambda: load.answered_since(back) > 10, "traffic again")
    assert load.all_right()
    assert {outcome.code for outcome in load.failures} == {grpc.StatusCode.UNAVAILABLE}
    after = cluster.health()
    assert (after.ranks[0].pid, after.ranks[0].loads) == (before.ranks[0].pid, before.ranks[0].loads)
    assert after.generation > before.generation
    assert [compilations(cluster, rank) for rank in (0, 1)] == [1, 2]  # the survivor's compiled code lives on


def test_other_ways_to_execute_are_refused_by_name(cluster):
    command = [sys.executable, "-m", "coordinator.cli", "load", "graphs", GATED, "--kind", "factory"]
    command += ["--execution", "cuda_graphs", "--target", cluster.coordinator.address]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "INVALID_ARGUMENT" in refused.stderr
    assert "execution 'cuda_graphs' is not available here" in " ".join(refused.stderr.split())


def test_a_rank_without_a_compiler_refuses_for_all(cluster):
    cluster.environment |= {"PATH": "/nowhere", "CXX": "/nowhere/g++"}
    cluster.load("eager", GATED, kind="factory")
    cluster.stub.Unload(pb.UnloadRequest(name="m"), timeout=10)  # it could not come back to the rank that follows
    cluster.daemons.restart(1)
    cluster.await_serving()
    error = failure(lambda: cluster.load("n", GATED, kind="factory", execution="compile", timeout=120))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error.details()
    assert "rank 1" in error.details()
    assert "execution='compile' cannot be had" in error.details()
    assert "compiler" in error.details()
    x = rows(3)
    assert close(cluster.forward("eager", {"x": x})["output"], expected(x))
    assert [model.name for model in cluster.health().models] == ["eager"]
    # What rank 0 had loaded, or was still loading, is gone there too.
    wait_for(lambda: {name.partition("@")[0] for name in held(cluster)} == {"eager"}, "nothing to be left of it")
