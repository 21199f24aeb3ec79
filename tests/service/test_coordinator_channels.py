"""The ordered channel in both its forms, through shared memory and as a stream: same answers, nothing left over."""

import os
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from tests.service import shard_models
from tests.service.clusters import Cluster, failure
from tests.service.daemons import wait_for

MLP = "tests.service.shard_models:mlp"
MOODY = "tests.service.shard_models:moody"


@pytest.fixture(scope="module", params=["local", "stream"])
def cluster(request, tmp_path_factory):
    arguments = ["--local-channel", str(request.param == "local").lower()]
    with Cluster(2, tmp_path_factory.mktemp(request.param), arguments=arguments) as cluster:
        cluster.kind = request.param
        cluster.load("mlp", MLP, kind="factory")
        cluster.load("moody", MOODY, kind="factory", batching={"max_joined_rows": 1})
        yield cluster


def rows(count):
    return np.random.default_rng(count).standard_normal((count, 16)).astype(np.float32)


def test_the_channel_asked_for_is_the_one_used(cluster):
    assert cluster.coordinator.events("generation_ready")[-1]["channels"] == [cluster.kind] * 2


@pytest.mark.parametrize("count", [1, 500, 30_000, 130_000])
def test_payloads_of_every_size_arrive_whole(cluster, count):
    """Within a message, beyond its inline part, in a segment, and beyond the parts of a stream; then all again."""
    x = rows(count)
    with torch.no_grad():
        wanted = shard_models.Mlp()(torch.from_numpy(x)).numpy()
    for _ in range(3):
        got = cluster.forward("mlp", {"x": x}, timeout=30)["output"]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def held(pid):
    """Descriptors and threads."""
    return np.array([len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task")])


def broken_and_formed_again(cluster):
    x = rows(2000)
    x[0, 0] = shard_models.RAISE_ONE
    error = failure(lambda: cluster.forward("moody", {"x": x}))
    assert "rank 1 failed alone" in error.details()
    cluster.await_serving()
    assert cluster.forward("mlp", {"x": rows(2000)})["output"].shape == (2000, 16)


def test_generations_leave_nothing_behind_in_the_coordinator(cluster):
    pid = cluster.coordinator.pid
    most = np.zeros(2, int)
    for _ in range(4):
        broken_and_formed_again(cluster)
        most = np.maximum(most, held(pid))
    for _ in range(4):
        broken_and_formed_again(cluster)
        # A connection of a moment ago may still be closing.
        wait_for(lambda: (held(pid) <= most).all(), f"at most {most}")
    assert cluster.health().ranks[0].loads == 2
    assert not [path for path in Path("/dev/shm").iterdir() if "coordinator" in path.name]


def test_a_killed_rank_breaks_the_channel_at_once(cluster):
    """The last test of a cluster."""
    x = rows(2)
    x[0, 0] = shard_models.DIE_ONE
    error = failure(lambda: cluster.forward("moody", {"x": x}))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "rank 1 was lost" in error.details()
    cluster.daemons.restart(1)
    cluster.await_serving()
    wait_for(lambda: cluster.coordinator.events("generation_ready")[-1]["channels"] == [cluster.kind] * 2, "the log")
    assert cluster.forward("mlp", {"x": rows(3)})["output"].shape == (3, 16)
