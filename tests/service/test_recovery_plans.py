"""A replacement is given what the survivors planned; where that cannot be, it plans by itself. Real kill -9."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
import torch

from tests.service import coordinator_models, shard_models
from tests.service.clusters import Cluster
from tests.service.shard_client import Rank

pytestmark = pytest.mark.timeout(120)
MODELS = {
    "m": "tests.service.shard_models:mlp",
    "head": "tests.service.coordinator_models:head",
    "paired": "tests.service.coordinator_models:paired",
}
GIVEN = {"m": "a peer", "head": "a peer", "paired": "this rank"}
"""Who plans for a replacement that is given what can be passed on; of ``paired`` it cannot."""
ALONE = dict.fromkeys(MODELS, "this rank")
OLDER = "tests.service.older_daemon"
X = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
IDS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plans")
    with Cluster(3, directory, arguments=["--state-dir", f"{directory}/state", "--lease-ms", "1500"]) as cluster:
        for name, path in MODELS.items():
            cluster.load(name, path, kind="factory")
        yield cluster


def replace(cluster: Cluster, *lost: int, coordinator: bool = False, module: str = "") -> None:
    """kill -9 of ranks at once, and of the coordinator; others in their places; until all serves again."""
    for rank in lost:
        cluster.daemons[rank].kill()
    if coordinator:
        cluster.coordinator.kill()
    else:
        cluster.await_not_serving()
    for rank in lost:
        cluster.daemons.restart(rank, module=module)
    if coordinator:
        cluster.restart_coordinator()
    cluster.await_serving()


def planned_by(cluster: Cluster, rank: int) -> dict[str, str]:
    """By model: who made the plan that the rank goes by. Its processes write to one log, the last one last."""
    return {line["model"]: line["planned_by"] for line in cluster.daemons[rank].events("load_finished")}


def right(cluster: Cluster) -> bool:
    """Whether the answers are the unsharded models', and the ranks agree on what they hold."""
    with torch.no_grad():
        m = shard_models.Mlp()(torch.from_numpy(X)).numpy()
        head = coordinator_models.Head()(torch.from_numpy(IDS)).numpy()
    np.testing.assert_allclose(cluster.forward("m", {"x": X})["output"], m, rtol=1e-5, atol=1e-6)
    for name in ("head", "paired"):
        np.testing.assert_allclose(cluster.forward(name, {"ids": IDS})["output"], head, rtol=1e-5, atol=1e-6)
    held = [digests(address) for address in cluster.daemons.addresses]
    return all(each.keys() == held[0].keys() for each in held) and all(
        each[name][:2] == held[0][name][:2] for each in held for name in MODELS
    )


def digests(address: str) -> dict[str, tuple[str, str, str]]:
    rank = Rank(address)
    try:
        models = rank.status().models
    finally:
        rank.close()
    return {model.name: (model.source_digest, model.plan_digest, model.shard_digest) for model in models}


def codes(cluster: Cluster, model: str) -> set[str]:
    """What survivors answered that did not give their plan."""
    refused = cluster.coordinator.events("plan_not_exported")
    return {line["code"] for line in refused if line["model"].startswith(f"{model}@")}


def loads(cluster: Cluster) -> list[int]:
    return [rank.loads for rank in cluster.health().ranks]


@pytest.mark.parametrize("lost", [(2,), (0, 1)], ids=["one", "two"])
def test_replacements_go_by_the_survivors_plans(cluster, lost):
    before = [digests(address) for address in cluster.daemons.addresses]
    kept = {rank: loads(cluster)[rank] for rank in range(3) if rank not in lost}
    replace(cluster, *lost)
    assert right(cluster)
    assert {rank: planned_by(cluster, rank) for rank in lost} == dict.fromkeys(lost, GIVEN)
    assert [digests(address) for address in cluster.daemons.addresses] == before
    assert codes(cluster, "paired") == {grpc.StatusCode.FAILED_PRECONDITION.name}
    assert not codes(cluster, "m")
    assert {rank: loads(cluster)[rank] for rank in kept} == kept


def test_a_coordinator_that_knows_nothing_yet_asks_for_them_too(cluster):
    replace(cluster, 1, coordinator=True)
    assert right(cluster)
    assert planned_by(cluster, 1) == GIVEN


def test_without_survivors_every_rank_plans(cluster):
    replace(cluster, 0, 1, 2)
    assert right(cluster)
    assert [planned_by(cluster, rank) for rank in range(3)] == [ALONE] * 3


def test_a_replacement_of_an_older_build_makes_nothing_of_a_plan(cluster):
    replace(cluster, 2, module=OLDER)
    assert right(cluster)
    assert planned_by(cluster, 2) == ALONE


def test_survivors_of_an_older_build_have_none_to_give(cluster):
    replace(cluster, 0, 1, module=OLDER)
    replace(cluster, 2)
    assert right(cluster)
    assert planned_by(cluster, 2) == ALONE
    assert codes(cluster, "m") == {grpc.StatusCode.UNIMPLEMENTED.name}
