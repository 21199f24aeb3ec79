"""Loads, flips and unloads beside traffic; failures leave what served before."""

import json
import threading
import time

import grpc
import numpy as np
import pytest
import torch

from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from tests.service import shard_models
from tests.service.clusters import Caller, Cluster, failure
from tests.service.daemons import wait_for
from tests.service.load_generator import LoadGenerator

MLP = "tests.service.shard_models:mlp"
DEEP = "tests.service.shard_models:deep"
PICKY = "tests.service.shard_models:picky"
X = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
Code = grpc.StatusCode


def expected():
    with torch.no_grad():
        return shard_models.Mlp()(torch.from_numpy(X)).numpy()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(2, tmp_path_factory.mktemp("loading")) as cluster:
        yield cluster


def unload(cluster, name):
    cluster.stub.Unload(pb.UnloadRequest(name=name), timeout=20)


def held(cluster):
    """name@version by rank, as each rank itself says."""
    return [set(rank.models) for rank in cluster.health().ranks]


def test_progress_is_streamed_and_ends_serving(cluster):
    messages = cluster.load("progress", MLP, kind="factory")
    stages = [message.stage for message in messages]
    assert stages == sorted(stages)
    assert stages[-2:] == [pb.LoadProgress.LOADED, pb.LoadProgress.SERVING]
    final = messages[-1]
    assert (final.name, final.version) == ("progress", "1")
    assert final.model.serving
    assert [spec.name for spec in final.model.inputs] == ["x"]
    assert [progress.rank for progress in final.ranks] == [0, 1]
    assert all(progress.bytes_done == progress.bytes_total > 0 for progress in final.ranks)
    listed = cluster.stub.ListModels(pb.ListModelsRequest(), timeout=5).models
    assert [(model.name, model.serving, len(model.bytes_per_rank)) for model in listed] == [("progress", True, 2)]
    unload(cluster, "progress")


def test_a_new_version_under_load_loses_no_request(cluster):
    cluster.load("m", MLP, kind="factory")
    with LoadGenerator(cluster.coordinator.address, "m", {"x": X}, expected()) as load:
        for version in ("2", "3", "4"):
            wait_for(lambda: load.answered_since(0) > 20, "traffic")
            assert cluster.load("m", MLP, kind="factory")[-1].version == version
            flipped = time.monotonic()
            wait_for(lambda at=flipped: load.answered_since(at) > 10, "traffic after the flip")
            assert cluster.forward("m", {"x": X}, version=version)
    assert not load.failures
    assert load.all_right()
    wait_for(lambda: held(cluster) == [{"m@4"}, {"m@4"}], "the old versions to leave the ranks")
    assert failure(lambda: cluster.forward("m", {"x": X}, version="1")).code() is Code.NOT_FOUND
    unload(cluster, "m")


def test_unloading_under_load_answers_everything(cluster):
    cluster.load("m", MLP, kind="factory")
    with LoadGenerator(cluster.coordinator.address, "m", {"x": X}, expected()) as load:
        wait_for(lambda: load.answered_since(0) > 20, "traffic")
        unload(cluster, "m")
        wait_for(lambda: load.failures, "callers to be told")
    assert {outcome.code for outcome in load.failures} == {Code.NOT_FOUND}
    assert load.all_right()
    assert held(cluster) == [set(), set()]
    assert failure(lambda: unload(cluster, "m")).code() is Code.NOT_FOUND
    assert cluster.load("m", MLP, kind="factory")[-1].model.serving
    unload(cluster, "m")


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (pb.LoadRequest(path="p"), Code.INVALID_ARGUMENT, "'' cannot be the name"),
        (pb.LoadRequest(name="coordinator", path="p"), Code.INVALID_ARGUMENT, "cannot be the name"),
        (pb.LoadRequest(name="a\nb", path="p"), Code.INVALID_ARGUMENT, "cannot be the name"),
        (pb.LoadRequest(name="a"), Code.INVALID_ARGUMENT, "path is empty"),
        (pb.LoadRequest(name="serving", path="p", version="1"), Code.FAILED_PRECONDITION, "is there already"),
        (pb.LoadRequest(name="serving", path="no/such/model"), Code.INVALID_ARGUMENT, "no/such/model"),
        (pb.LoadRequest(name="fresh", path="no/such/model"), Code.INVALID_ARGUMENT, "no/such/model"),
        (pb.LoadRequest(name="picky", path=PICKY), Code.INVALID_ARGUMENT, "forward raised LookupError: no five"),
        (pb.LoadRequest(name="picky", path=PICKY), Code.INVALID_ARGUMENT, "x float32[2, 16]"),
    ],
)
def test_a_load_that_fails_changes_nothing(cluster, request_, code, said):
    if not cluster.health().models:
        cluster.load("serving", MLP, kind="factory")
    error = failure(lambda: list(cluster.stub.Load(request_, timeout=20)))
    assert error.code() is code
    assert said in error.details()
    np.testing.assert_allclose(cluster.forward("serving", {"x": X})["output"], expected(), rtol=1e-5, atol=1e-6)
    assert [(model.name, model.version) for model in cluster.health().models] == [("serving", "1")]
    assert held(cluster) == [{"serving@1"}] * 2
    assert cluster.health().serving


def test_a_load_that_is_cancelled_leaves_nothing(cluster):
    """Cancelled at once, it may or may not have been committed; either way the ranks hold what the catalog says."""
    for _ in range(5):
        call = cluster.stub.Load(pb.LoadRequest(name="c", path=MLP, options=pb.LoadOptions(kind="factory")), timeout=20)
        next(call)
        call.cancel()
        names = {f"{m.name}@{m.version}" for m in wait_for(lambda: settled(cluster), "the load to settle").models}
        assert held(cluster) == [names, names]
    if any(model.name == "c" for model in cluster.health().models):
        unload(cluster, "c")


def test_planning_stops_when_its_load_is_cancelled(cluster, tmp_path):
    """Not at its end: the next load does not wait for a plan that nobody wants."""
    before = [(rank.loads, rank.bytes_held) for rank in cluster.health().ranks]
    options = pb.LoadOptions(kind="factory", arguments_json=json.dumps({"path": f"{tmp_path}/traced"}))
    call = cluster.stub.Load(pb.LoadRequest(name="deep", path=DEEP, options=options), timeout=60)
    next(call)
    wait_for(lambda: len(layers_traced(tmp_path)) == 2, "both ranks to trace")
    call.cancel()
    cluster.load("next", MLP, kind="factory")
    assert all(count < 250 for count in layers_traced(tmp_path)), "one of them traced the whole model"
    after = [(rank.loads, rank.bytes_held) for rank in cluster.health().ranks]
    [size] = {now[1] - then[1] for then, now in zip(before, after, strict=True)}
    assert 0 < size < 10_000  # of the small model alone
    assert [now[0] - then[0] for then, now in zip(before, after, strict=True)] == [1, 1]
    assert not [name for names in held(cluster) for name in names if name.startswith("deep")]
    unload(cluster, "next")


def layers_traced(directory):
    """By rank, of those that have begun."""
    return [file.stat().st_size for file in directory.glob("traced.*")]


def settled(cluster):
    health = cluster.health()
    names = {f"{model.name}@{model.version}" for model in health.models}
    return health if all(set(rank.models) == names for rank in health.ranks) else None


def test_loads_of_one_name_take_turns_and_others_go_on(cluster):
    outcomes = []

    def load(name):
        caller = Caller(cluster.coordinator.address)
        try:
            outcomes.append(caller.load(name, MLP, kind="factory")[-1].name)
        except grpc.RpcError as error:
            outcomes.append(error.code())
        caller.close()

    threads = [threading.Thread(target=load, args=(name,)) for name in ("a", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert {"a", "b"} <= set(outcomes)
    assert set(outcomes) <= {"a", "b", Code.FAILED_PRECONDITION}
    for name in ("a", "b"):
        unload(cluster, name)
