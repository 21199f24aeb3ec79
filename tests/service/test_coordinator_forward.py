"""Forward and ForwardStream through a real coordinator and real daemons: right answers, and clear refusals."""

import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import torch

from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from tests.service import coordinator_models, shard_models
from tests.service.clusters import Cluster, arrays, failure, forward_request
from tests.service.daemons import wait_for

MLP = "tests.service.shard_models:mlp"
MOODY = "tests.service.shard_models:moody"
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    directory = tmp_path_factory.mktemp("forward")
    gate = directory / "gate"
    with Cluster(2, directory, arguments=["--queue-size", "8"], env={"TEST_GATE": str(gate)}) as cluster:
        cluster.gate = gate
        cluster.load("mlp", MLP, kind="factory", batching={"max_batch_size": 512})
        cluster.load("moody", MOODY, kind="factory", batching={"max_joined_rows": 1})
        yield cluster


def rows(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)


def expected(x):
    with torch.no_grad():
        return shard_models.Mlp()(torch.from_numpy(x)).numpy()


def mood(number):
    x = rows(2)
    x[0, 0] = number
    return {"x": x}


def test_the_answer_is_the_unsharded_models(cluster):
    x = rows(5)
    np.testing.assert_allclose(cluster.forward("mlp", {"x": x})["output"], expected(x), rtol=1e-5, atol=1e-6)


def test_the_request_id_travels_and_comes_back(cluster):
    request = forward_request("mlp", {"x": rows(1)})
    _, call = cluster.stub.Forward.with_call(request, metadata=(("x-request-id", "by-metadata"),))
    assert ("x-request-id", "by-metadata") in [tuple(pair) for pair in call.trailing_metadata()]
    answer = cluster.stub.Forward(forward_request("mlp", {"x": rows(1)}, request_id="by-field"))
    assert answer.request_id == "by-field"
    assert (answer.model, answer.version) == ("mlp", "1")
    for process in (cluster.coordinator, *cluster.daemons):
        for id in ("by-metadata", "by-field"):
            wait_for(
                lambda p=process, i=id: [e for e in p.events("forward") if e["request_id"] == i], f"{id} in the log"
            )


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (forward_request("nobody", {"x": rows(1)}), Code.NOT_FOUND, "no model 'nobody' (loaded: mlp, moody)"),
        (forward_request("mlp", {"x": rows(1)}, version="9"), Code.NOT_FOUND, "no version '9'"),
        (forward_request("mlp", {}), Code.INVALID_ARGUMENT, "'x' of model 'mlp' is missing"),
        (forward_request("mlp", {"x": rows(1), "y": rows(1)}), Code.INVALID_ARGUMENT, "no input 'y'"),
        (forward_request("mlp", {"x": rows(1).astype(np.float64)}), Code.INVALID_ARGUMENT, "'x' is float64"),
        (forward_request("mlp", {"x": rows(1)[0]}), Code.INVALID_ARGUMENT, "'x' has 1 dimensions [16]"),
        (forward_request("mlp", {"x": rows(0)}), Code.INVALID_ARGUMENT, "'x' is empty"),
        (forward_request("mlp", {"x": rows(513)}), Code.INVALID_ARGUMENT, "513 rows is over the 512"),
        (forward_request("mlp", {"x": rows(1)}, outputs=["z"]), Code.INVALID_ARGUMENT, "no output 'z'"),
        (pb.ForwardRequest(), Code.NOT_FOUND, "no model ''"),
    ],
)
def test_what_is_wrong_is_refused_by_name(cluster, request_, code, said):
    error = failure(lambda: cluster.stub.Forward(request_, timeout=10))
    assert error.code() is code
    assert said in error.details()
    assert "Traceback" not in error.details()


def test_bytes_that_are_no_request_are_the_clients_fault(cluster):
    call = cluster.channel.unary_unary("/tensor_parallel.v1.Coordinator/Forward")
    assert failure(lambda: call(b"\xff\xff\xff", timeout=10)).code() is Code.INVALID_ARGUMENT
    call = cluster.channel.unary_unary("/tensor_parallel.v1.Coordinator/Unload")
    assert failure(lambda: call(b"\xff\xff\xff", timeout=10)).code() is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(("number", "said"), [(shard_models.RAISE, "bad mood"), (shard_models.MEMORY, "memory")])
def test_an_error_alike_on_all_ranks_costs_nobody_else_anything(cluster, number, said):
    generation = cluster.health().generation
    error = failure(lambda: cluster.forward("moody", mood(number)))
    assert said in error.details()
    if number == shard_models.MEMORY:
        assert error.code() is Code.RESOURCE_EXHAUSTED
    assert np.isfinite(cluster.forward("moody", mood(0))["output"]).all()
    assert cluster.health().generation == generation


@pytest.mark.parametrize("mebibytes", [96, 512])
def test_a_request_that_memory_does_not_suffice_for_is_refused_as_such(cluster, mebibytes):
    pid = cluster.coordinator.pid
    room = 160 << 20  # for the smaller message, and not for it once more in the ranks' memory
    huge = {"x": np.zeros((mebibytes << 14, 16), np.float32)}
    generation = cluster.health().generation
    resource.prlimit(pid, resource.RLIMIT_AS, (address_space(pid) + room, resource.RLIM_INFINITY))
    try:
        error = failure(lambda: cluster.forward("moody", huge))
        assert cluster.forward("mlp", {"x": rows(1)})["output"].shape == (1, 16)
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert "no memory" in error.details()
    health = cluster.health()
    assert (health.serving, health.generation) == (True, generation)


def address_space(pid):
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def test_concurrent_requests_are_joined_and_each_gets_its_own_rows(cluster):
    inputs = [rows(1 + n % 3, seed=n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            answers = list(pool.map(lambda x: cluster.forward("mlp", {"x": x}, request_id="joined")["output"], inputs))
            for x, y in zip(inputs, answers, strict=True):
                np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-6)
    executed = wait_for(lambda: executed_as(cluster, "joined", 80), "all to be in the log")
    assert len(executed) < 80


def executed_as(cluster, id, count):
    """Log lines of the forwards of ``count`` requests called ``id``; none until there are as many."""
    lines = [line for line in cluster.daemons[0].events("forward") if id in line["request_id"].split(",")]
    have = sum(line["request_id"].split(",").count(id) for line in lines)
    assert have <= count
    return lines if have == count else []


def test_a_model_whose_rows_depend_on_each_other_is_never_joined(cluster):
    final = cluster.load("time", "tests.service.coordinator_models:time_first", kind="factory")[-1]
    assert any("rows of one batch depend on each other" in warning for warning in final.model.warnings)
    model = coordinator_models.TimeFirst()
    inputs = [rows(2 + n % 3, seed=n) for n in range(6)]
    with ThreadPoolExecutor(6) as pool, torch.no_grad():
        for x, y in zip(inputs, pool.map(lambda x: cluster.forward("time", {"x": x})["output"], inputs), strict=True):
            np.testing.assert_allclose(y, model(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-5)
    cluster.stub.Unload(pb.UnloadRequest(name="time"), timeout=20)


def test_outputs_that_stay_sharded_are_put_together(cluster):
    final = cluster.load("head", "tests.service.coordinator_models:head", kind="factory")[-1]
    assert not final.model.warnings
    ids = np.random.default_rng(0).integers(0, 101, (3, 7))
    with torch.no_grad():
        wanted = coordinator_models.Head()(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(cluster.forward("head", {"ids": ids})["output"], wanted, rtol=1e-5, atol=1e-6)
    error = failure(lambda: cluster.forward("head", {"ids": ids + 50}))
    assert error.code() is Code.INVALID_ARGUMENT
    assert "the model takes 0 to 100" in error.details()
    cluster.stub.Unload(pb.UnloadRequest(name="head"), timeout=20)


class Hold:
    """Keeps the ranks busy with requests that wait, and lets go when left."""

    def __init__(self, cluster, count=2):
        self.gate = cluster.gate
        self.gate.touch()
        self.calls = [
            cluster.stub.Forward.future(forward_request("moody", mood(shard_models.GATE), request_id=f"gate-{n}"))
            for n in range(count)
        ]
        wait_for(lambda: cluster.health().coordinator.in_flight >= count, "the ranks to be busy")

    def __enter__(self):
        return self

    def __exit__(self, *about):
        self.gate.unlink()
        for call in self.calls:
            call.result(timeout=20)


def test_the_queue_overflows_politely_and_drops_what_is_cancelled_or_late(cluster):
    request = forward_request("moody", mood(0))
    with Hold(cluster):
        waiting = [cluster.stub.Forward.future(request) for _ in range(6)]
        late = cluster.stub.Forward.future(forward_request("moody", mood(0), request_id="late"), timeout=0.05)
        cancelled = cluster.stub.Forward.future(forward_request("moody", mood(0), request_id="cancelled"))
        wait_for(lambda: late.done() and cluster.health().coordinator.queue_depth == 7, "the queue to fill")
        last = cluster.stub.Forward.future(forward_request("moody", mood(0), request_id="last"))
        wait_for(lambda: cluster.health().coordinator.queue_depth == 8, "the queue to be full")
        full = failure(lambda: cluster.stub.Forward(request, timeout=10))
        assert full.code() is Code.RESOURCE_EXHAUSTED
        assert "queue is full" in full.details()
        assert int(dict(full.trailing_metadata())["retry-after-ms"]) > 0
        cancelled.cancel()
        wait_for(lambda: cluster.health().coordinator.queue_depth == 7, "the cancelled request to leave")
    assert late.code() is Code.DEADLINE_EXCEEDED
    for call in [*waiting, last]:
        call.result(timeout=10)
    wait_for(lambda: executed_as(cluster, "last", 1), "the last one to be in the log")
    for dropped in ("late", "cancelled"):
        assert not executed_as(cluster, dropped, 0)


# ---- streams


def stream(cluster, messages, timeout=20):
    return list(cluster.stub.ForwardStream(iter(messages), timeout=timeout))


def begin(request, *, data=True):
    message = pb.ForwardStreamRequest(begin=request)
    if not data:
        for tensor in message.begin.inputs:
            tensor.ClearField("content")
    return message


def chunks(id, tensor, data, size):
    for offset in range(0, len(data), size):
        piece = data[offset : offset + size]
        chunk = pb.TensorChunk(request_id=id, tensor=tensor, offset=offset, data=piece, last=offset + size >= len(data))
        yield pb.ForwardStreamRequest(chunk=chunk)


def test_many_requests_share_a_stream_and_a_bad_one_ends_nothing(cluster):
    inputs = {f"r{n}": rows(2, seed=n) for n in range(5)}
    messages = [begin(forward_request("mlp", {"x": x}, request_id=id)) for id, x in inputs.items()]
    messages.insert(2, begin(forward_request("nobody", {"x": rows(1)}, request_id="bad")))
    answers = {answer.request_id: answer for answer in stream(cluster, messages)}
    assert answers["bad"].error.code == Code.NOT_FOUND.value[0]
    assert all(answer.last for answer in answers.values())
    for id, x in inputs.items():
        np.testing.assert_allclose(arrays(answers[id].response)["output"], expected(x), rtol=1e-5, atol=1e-6)


def test_tensors_travel_in_chunks_both_ways(cluster):
    cluster.load("big", MLP, kind="factory")
    x = rows(100_000)
    request = forward_request("big", {"x": x}, request_id="big")
    messages = [begin(request, data=False), *chunks("big", "x", x.tobytes(), 1 << 20)]
    answers = stream(cluster, messages, timeout=40)
    assert len(answers) > 3
    assert [answer.last for answer in answers] == [False] * (len(answers) - 1) + [True]
    data = b"".join(answer.chunk.data for answer in answers[1:])
    np.testing.assert_allclose(np.frombuffer(data, np.float32).reshape(x.shape), expected(x), rtol=1e-4, atol=1e-5)
    single = cluster.forward("big", {"x": x}, timeout=40)["output"]
    np.testing.assert_allclose(single, expected(x), rtol=1e-4, atol=1e-5)
    cluster.stub.Unload(pb.UnloadRequest(name="big"), timeout=20)


@pytest.mark.parametrize(
    "messages",
    [
        [pb.ForwardStreamRequest()],
        [begin(forward_request("mlp", {"x": rows(1)}))],  # no request_id
        [begin(forward_request("mlp", {"x": rows(1)}, request_id="r"), data=False)],  # ends within
        [begin(forward_request("mlp", {"x": rows(1)}, request_id="r"), data=False), *chunks("r", "y", b"1234", 4)],
        [begin(forward_request("mlp", {"x": rows(1)}, request_id="r"), data=False), *chunks("r", "x", b"1" * 65, 65)],
        [
            begin(forward_request("mlp", {"x": rows(1)}, request_id="r"), data=False),
            *list(chunks("r", "x", b"1" * 8, 4))[1:],
        ],
    ],
)
def test_a_malformed_stream_is_the_clients_fault(cluster, messages):
    assert failure(lambda: stream(cluster, messages)).code() is Code.INVALID_ARGUMENT


def test_a_tensor_cut_short_is_refused_in_band(cluster):
    request = forward_request("mlp", {"x": rows(1)}, request_id="short")
    messages = [begin(request, data=False), *chunks("short", "x", b"1" * 8, 8)]
    (answer,) = stream(cluster, messages)
    assert answer.error.code == Code.INVALID_ARGUMENT.value[0]
    assert "has 8 bytes" in answer.error.message


def test_a_client_that_leaves_its_stream_takes_its_requests_along(cluster):
    release = threading.Event()

    def messages():
        yield begin(forward_request("mlp", {"x": rows(1)}, request_id="only"))
        release.wait(20)

    call = cluster.stub.ForwardStream(messages(), timeout=20)
    assert next(call).request_id == "only"
    call.cancel()
    release.set()
    wait_for(lambda: cluster.health().coordinator.in_flight == 0, "nothing to be in flight")
    started = time.monotonic()
    cluster.forward("mlp", {"x": rows(1)})
    assert time.monotonic() - started < 10
