"""Two real daemons, a raw client in the coordinator's place: generations, order, failures, and what survives them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import torch

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2
from tests.service import shard_models
from tests.service.daemons import Daemons, wait_for
from tests.service.shard_client import Rank, Ranks, StreamChannel, array, wire

MLP, MOODY = "tests.service.shard_models:mlp", "tests.service.shard_models:moody"
FACTORIES = ["--allow-factory", "tests.service.shard_models:mlp", "--allow-factory", "tests.service.shard_models:moody"]
PROBE = shard_pb2.Probe()
QUICK = coordinator_pb2.LoadOptions(verify=False)


@pytest.fixture(scope="module", params=["gloo", "shm"])
def daemons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    directory = tmp_path_factory.mktemp(request.param)
    with Daemons(2, directory, arguments=[*FACTORIES, "--backend", request.param]) as started:
        started.backend = request.param
        yield started


@pytest.fixture
def ranks(daemons: Daemons) -> Iterator[Ranks]:
    """Both models loaded, a generation formed."""
    for rank, member in enumerate(daemons):
        if not member.alive:
            daemons.restart(rank)
    with Ranks(daemons.addresses) as made:
        made.load("mlp", MLP, options=QUICK)
        made.load("moody", MOODY, options=QUICK)
        made.form()
        yield made


def inputs(mood: float = 0.0, rows: int = 2) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((rows, 16)).astype(np.float32)
    x[0, 0] = mood
    return x


def expected(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return shard_models.mlp()[0](torch.from_numpy(x)).numpy()


def assert_serves(ranks: Ranks, model: str = "mlp") -> None:
    x = inputs()
    first, *_ = ranks.execute(model, x=x)
    assert first.HasField("execute"), first
    np.testing.assert_allclose(array(first.execute.outputs[0]), expected(x), atol=1e-5)


def lease_of(rank: Rank) -> int:
    return rank.status().lease_milliseconds


def test_forward_is_right_and_sent_once(ranks: Ranks) -> None:
    x = inputs(rows=5)
    first, second = ranks.execute("mlp", x=x)
    np.testing.assert_allclose(array(first.execute.outputs[0]), expected(x), atol=1e-5)
    assert [output.name for output in first.execute.outputs] == ["output"]
    assert not second.execute.outputs
    assert first.execute.forward_seconds > first.execute.collective_seconds > 0


def test_large_tensors_travel_in_parts(ranks: Ranks) -> None:
    x = inputs(rows=150_000)  # 9.6 MB
    data = x.tobytes()
    command = shard_pb2.ExecuteModel(model="mlp", version="1", inputs=[wire("x", x, data=False)])
    step = 1 << 20
    for channel in ranks.channels:
        for offset in range(0, len(data), step):
            piece = data[offset : offset + step]
            channel.send(ranks.seq, part=shard_pb2.TensorPart(tensor="x", offset=offset, data=piece))
    ranks.send(execute=command)
    came = b""
    while (response := ranks.channels[0].receive()).HasField("part"):
        assert response.part.offset == len(came)
        came += response.part.data
    np.testing.assert_allclose(array(response.execute.outputs[0], came), expected(x), atol=1e-5)
    assert ranks.channels[1].receive().HasField("execute")


def test_commands_pipeline_in_order(ranks: Ranks) -> None:
    command = shard_pb2.ExecuteModel(model="mlp", version="1", inputs=[wire("x", inputs())])
    sent = [ranks.send(execute=command) if turn % 3 else ranks.send(probe=PROBE) for turn in range(30)]
    for channel in ranks.channels:
        assert [channel.receive().seq for _ in sent] == sent
    # It is counted once it has been answered.
    wait_for(lambda: [rank.status().executed for rank in ranks.ranks] == [30, 30], "all to be counted")


def test_status_tells_progress(daemons: Daemons, ranks: Ranks) -> None:
    assert ranks.run(probe=PROBE)[0].HasField("done")
    status = wait_for(lambda: status if (status := ranks[1].status()).executed else None, "the probe to be counted")
    assert (status.rank, status.world_size, status.pid) == (1, 2, daemons[1].pid)
    assert (status.state, status.generation, status.owner) == ("READY", ranks.generation, "tester")
    assert (status.executed, status.busy_milliseconds) == (1, 0)
    assert status.since_collective_milliseconds < 5000
    assert status.device == "cpu"
    assert 0 < status.bytes_held < status.peak_bytes < status.device_memory
    assert {(model.name, model.state) for model in status.models} == {("mlp", "ACTIVE"), ("moody", "ACTIVE")}
    assert 0 < status.lease_milliseconds <= 3000


@pytest.mark.parametrize("wrong", ["gap", "repeat", "generation"])
def test_a_command_out_of_order_ends_the_generation(ranks: Ranks, wrong: str) -> None:
    ranks.run(probe=PROBE)
    seq, generation = {
        "gap": (2, ranks.generation),
        "repeat": (0, ranks.generation),
        "generation": (1, ranks.generation - 1),
    }[wrong]
    for channel in ranks.channels:
        channel.send(seq, generation, probe=PROBE)
    for answer in ranks.receive():
        assert "out of order" in answer.broken.reason
    assert [channel.receive() for channel in ranks.channels] == [None, None]
    assert [rank.status().state for rank in ranks.ranks] == ["BROKEN", "BROKEN"]
    ranks.form()
    assert_serves(ranks)


def test_errors_alike_are_the_requests_own(ranks: Ranks) -> None:
    x = inputs()
    cases = [
        (ranks.execute("mlp", y=x), grpc.StatusCode.INVALID_ARGUMENT, "y"),
        (ranks.execute("mlp", x=x.astype(np.float64)), grpc.StatusCode.INVALID_ARGUMENT, "x"),
        (ranks.execute("mlp", x=x[:, :5]), grpc.StatusCode.INVALID_ARGUMENT, ""),
        (ranks.execute("mlp", x=x, outputs=["nope"]), grpc.StatusCode.INVALID_ARGUMENT, "nope"),
        (ranks.execute("nope", x=x), grpc.StatusCode.NOT_FOUND, "nope"),
        (ranks.execute("mlp", version="9", x=x), grpc.StatusCode.NOT_FOUND, "9"),
        (ranks.execute("moody", x=inputs(shard_models.RAISE)), grpc.StatusCode.INVALID_ARGUMENT, "bad mood"),
        (ranks.execute("moody", x=inputs(shard_models.MEMORY)), grpc.StatusCode.RESOURCE_EXHAUSTED, "memory"),
        (ranks.run(activate=shard_pb2.ActivateModel(name="no", version="1")), grpc.StatusCode.NOT_FOUND, "no"),
        (ranks.run(unload=shard_pb2.UnloadModel(name="no", version="1")), grpc.StatusCode.NOT_FOUND, "no"),
        (ranks.run(), grpc.StatusCode.INVALID_ARGUMENT, "none"),
    ]
    for (first, second), code, word in cases:
        assert first.failure.code == second.failure.code == code.value[0], first
        assert first.failure.kind == second.failure.kind
        assert word in first.failure.message
        assert not first.failure.collective
        assert not second.failure.collective
    assert_serves(ranks)


@pytest.mark.parametrize("mood", [shard_models.RAISE_ONE, shard_models.MEMORY_ONE])
def test_an_uneven_error_is_told_by_one_and_fenced_away(ranks: Ranks, mood: float) -> None:
    command = shard_pb2.ExecuteModel(model="moody", version="1", inputs=[wire("x", inputs(mood))])
    ranks.send(execute=command)
    failure = ranks.channels[1].receive().failure
    code = "INVALID_ARGUMENT" if mood == shard_models.RAISE_ONE else "RESOURCE_EXHAUSTED"
    assert failure.code == grpc.StatusCode[code].value[0]
    assert not failure.collective
    wait_for(lambda: ranks[0].status().busy_milliseconds > 50, "rank 0 to wait for rank 1")
    loads = [rank.status().loads for rank in ranks.ranks]
    ranks.form()
    assert_serves(ranks)
    assert_serves(ranks, "moody")
    assert [rank.status().loads for rank in ranks.ranks] == loads


def test_errors_alike_at_different_collectives_are_told_apart(ranks: Ranks) -> None:
    """Both ranks run out of memory, but rank 1 one all-gather later: it has taken rank 0's next one for this one."""
    apart, next_one = (
        shard_pb2.ExecuteModel(model="moody", version="1", inputs=[wire("x", inputs(mood))])
        for mood in (shard_models.MEMORY_APART, 0.0)
    )
    ranks.send(execute=apart)
    ranks.channels[0].send(1, execute=next_one)
    first, second = (channel.receive().failure for channel in ranks.channels)
    assert first.code == second.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert (first.kind, second.kind) == ("OutOfMemory", "OutOfMemory@1")
    ranks.form()
    assert_serves(ranks)


def test_a_killed_rank_is_told_at_once_and_replaced(daemons: Daemons, ranks: Ranks) -> None:
    before = ranks[0].status()
    command = shard_pb2.ExecuteModel(model="moody", version="1", inputs=[wire("x", inputs(shard_models.DIE_ONE))])
    started = time.monotonic()
    ranks.send(execute=command)
    answer = ranks.channels[0].receive()
    assert time.monotonic() - started < 5
    assert answer.failure.collective
    assert answer.failure.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert ranks.channels[0].receive().HasField("broken")
    assert ranks.channels[0].receive() is None
    assert isinstance(ranks.channels[1].receive(), grpc.RpcError)
    assert ranks[0].status().state == "BROKEN"
    daemons.restart(1)
    for name, path in (("mlp", MLP), ("moody", MOODY)):
        ranks[1].load(name, path, options=QUICK)
    ranks.form()
    assert_serves(ranks)
    after = ranks[0].status()
    assert (after.pid, after.incarnation, after.loads) == (before.pid, before.incarnation, before.loads)
    assert ranks[1].status().pid == daemons[1].pid


def test_a_stopped_rank_touches_nothing_of_the_next_generation(daemons: Daemons, ranks: Ranks) -> None:
    command = shard_pb2.ExecuteModel(model="mlp", version="1", inputs=[wire("x", inputs())])
    daemons[1].suspend()
    try:
        ranks.send(execute=command)
        wait_for(lambda: ranks[0].status().busy_milliseconds > 100, "rank 0 to wait for rank 1")
        old = ranks.generation
        assert ranks[0].fence(old + 1).accepted
        assert "fenced by tester" in str(ranks.channels[0].receive())
        assert ranks[0].status().state == "FENCED"
    finally:
        daemons[1].signal(signal.SIGCONT)
    # Rank 1 wakes up in the old generation, finds its peers gone, and says so; it is fenced before it may join.
    last = ranks.channels[1].receive()
    while last is not None and last.WhichOneof("result") == "failure":
        last = ranks.channels[1].receive()
    assert last is None or last.HasField("broken")
    with pytest.raises(grpc.RpcError) as refused:
        ranks[1].join(old + 1, ranks[0].status().store_address)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    ranks.form()
    for _ in range(5):
        assert_serves(ranks)


def test_stale_generations_are_refused(ranks: Ranks) -> None:
    for generation in (ranks.generation, ranks.generation - 1, 0):
        answer = ranks[0].fence(generation)
        assert not answer.accepted
        assert answer.highest_generation == ranks.generation
    for generation in (ranks.generation - 1, ranks.generation, ranks.generation + 1):
        with pytest.raises(grpc.RpcError) as refused:
            ranks[0].join(generation, ranks[0].status().store_address)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert_serves(ranks)


def test_a_generation_has_one_channel_of_its_owner(ranks: Ranks) -> None:
    def refusal(generation: int, owner: str) -> grpc.StatusCode:
        channel = StreamChannel(ranks[0].stub, generation, owner)
        answer = channel.receive()
        assert isinstance(answer, grpc.RpcError)
        return answer.code()

    assert refusal(ranks.generation, "tester") is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal(ranks.generation - 1, "tester") is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal(ranks.generation, "somebody") is grpc.StatusCode.ABORTED
    assert_serves(ranks)


def test_the_first_message_must_open(ranks: Ranks) -> None:
    requests = iter([shard_pb2.ChannelRequest(generation=ranks.generation, seq=0, probe=PROBE)])
    with pytest.raises(grpc.RpcError) as refused:
        next(ranks[0].stub.Execute(requests, timeout=10))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_serves(ranks)


def test_another_coordinator_waits_for_the_lease(ranks: Ranks, daemons: Daemons) -> None:
    other = Rank(daemons[0].address, "other")
    other.lease_ms = ranks[0].lease_ms = 800
    ranks.form()
    try:
        answer = other.fence(ranks.generation + 1)
        assert not answer.accepted
        assert answer.owner == "tester"
        assert 0 < answer.lease_milliseconds <= 800
        for call in (
            lambda: other.join(ranks.generation, ranks[0].status().store_address),
            lambda: other.load("mlp", MLP, lease=other.lease()),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.ABORTED
            assert "tester" in refused.value.details()
        other.status(renew=True)
        assert ranks[0].status().owner == "tester"
        assert_serves(ranks)
        # The owner falls silent; its lease lapses; the other may have the rank, and the old owner is told.
        wait_for(lambda: ranks[0].status().owner == "", "the lease to lapse")
        answer = other.fence(ranks.generation + 1)
        assert answer.accepted
        assert "fenced by other" in ranks.channels[0].receive().broken.reason
        answer = ranks[0].fence(ranks.generation + 2)
        assert not answer.accepted
        assert answer.owner == "other"
        wait_for(lambda: ranks[0].status().owner == "", "the other's lease to lapse")
    finally:
        other.close()


def test_renewing_keeps_the_lease_and_a_lost_channel_shortens_it(ranks: Ranks) -> None:
    wait_for(lambda: lease_of(ranks[0]) < 2500, "the lease to run down")
    ranks[0].status(renew=True)
    assert lease_of(ranks[0]) > 2500
    ranks.channels[0].close()
    wait_for(lambda: ranks[0].status().state == "BROKEN", "the lost channel to be noticed")
    status = ranks[0].status()
    assert status.lease_milliseconds <= 750
    assert "channel was lost" in status.last_error
    ranks[0].status(renew=True)
    assert lease_of(ranks[0]) > 2500


def test_join_names_the_model_that_differs(ranks: Ranks) -> None:
    held = {model.name: model for model in ranks[0].status().models}["mlp"]
    store = ranks[0].status().store_address
    cases = [
        ({"name": "other", "version": "1"}, "'other' version '1' is not loaded"),
        ({"name": "mlp", "version": "2"}, "'mlp' version '2' is not loaded"),
        ({"name": "mlp", "version": "1", "source_digest": "x"}, "the checkpoint changed"),
        ({"name": "mlp", "version": "1", "plan_digest": "x"}, "plan changed"),
        ({"name": "mlp", "version": "1", "source_digest": held.source_digest, "shard_digest": "x"}, "weights changed"),
    ]
    for fields, words in cases:
        ranks.generation += 1
        assert ranks[0].fence(ranks.generation).accepted
        with pytest.raises(grpc.RpcError) as refused:
            ranks[0].join(ranks.generation, store, [shard_pb2.JoinModel(**fields)])
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert words in refused.value.details()
        assert words in ranks[0].status().last_error
    ranks.form()
    assert_serves(ranks)


def test_a_join_whose_peer_never_comes_holds_nobody_up(ranks: Ranks) -> None:
    generation, store = ranks.generation + 1, ranks[0].status().store_address
    assert all(answer.accepted for answer in ranks.all(lambda rank: rank.fence(generation)))
    request = shard_pb2.JoinRequest(
        generation=generation, owner="tester", store_address=store, timeout_milliseconds=30_000
    )
    lonely = ranks[0].stub.Join.future(request, timeout=30)
    wait_for(lambda: ranks[0].status().generation == generation, "the join to be under way")
    started = time.monotonic()
    ranks.form()
    assert time.monotonic() - started < 5
    assert_serves(ranks)
    lonely.cancel()


def test_bad_store_addresses(ranks: Ranks) -> None:
    for address, code in (
        ("nonsense", "INVALID_ARGUMENT"),
        ("127.0.0.1:0", "INVALID_ARGUMENT"),
        ("127.0.0.1:1", "UNAVAILABLE"),
    ):
        ranks.generation += 1
        assert ranks[0].fence(ranks.generation).accepted
        with pytest.raises(grpc.RpcError) as refused:
            ranks[0].join(ranks.generation, address, milliseconds=300)
        assert refused.value.code().name == code
        assert ranks[0].status().state == "BROKEN"


def test_activation_and_unloading_are_ordered(ranks: Ranks) -> None:
    x = inputs()
    ranks.load("mlp", MLP, version="2", options=QUICK)
    [first, _] = ranks.execute("mlp", version="2", x=x)
    assert first.failure.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    ranks.send(activate=shard_pb2.ActivateModel(name="mlp", version="2"))
    command = shard_pb2.ExecuteModel(model="mlp", version="2", inputs=[wire("x", x)])
    ranks.send(execute=command)
    ranks.send(unload=shard_pb2.UnloadModel(name="mlp", version="2"))
    ranks.send(execute=command)
    for channel in ranks.channels:
        results = [channel.receive().WhichOneof("result") for _ in range(4)]
        assert results == ["done", "execute", "done", "failure"]
    assert_serves(ranks)
    assert {(model.name, model.version) for model in ranks[0].status().models} == {("mlp", "1"), ("moody", "1")}


def test_request_ids_reach_the_log(ranks: Ranks, daemons: Daemons) -> None:
    ranks.execute("mlp", request_ids=("id-1", "id-2"), x=inputs())
    for member in daemons:
        lines = wait_for(lambda m=member: [e for e in m.events("forward") if e["request_id"] == "id-1,id-2"], "the log")
        assert lines[0]["model"] == "mlp"
        assert lines[0]["generation"] == ranks.generation
