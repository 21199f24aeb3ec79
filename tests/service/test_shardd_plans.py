"""Plans out of one real daemon and into another: in any state, beside the executor, and never trusted."""

from __future__ import annotations

import random
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from coordinator.plans import with_plan
from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2
from tests.service import shard_models
from tests.service.daemons import Daemons, wait_for
from tests.service.shard_client import Ranks, array, wire

FACTORIES = ("mlp", "moody", "slow")
MLP, MOODY, SLOW = (f"tests.service.shard_models:{name}" for name in FACTORIES)
LIMIT = 128 << 10  # bytes of a message to these daemons: far below what a plan may have
X = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    directory = tmp_path_factory.mktemp("plans")
    allowed = [flag for name in FACTORIES for flag in ("--allow-factory", f"tests.service.shard_models:{name}")]
    arguments = [*allowed, "--max-message-bytes", str(LIMIT)]
    with Daemons(2, directory, arguments=arguments, env={"TEST_GATE": str(directory / "gate")}) as started:
        yield started


@pytest.fixture
def ranks(daemons: Daemons) -> Iterator[Ranks]:
    with Ranks(daemons.addresses) as made:
        made.load("mlp", MLP)
        yield made


def code(call) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code()


def planned_by(daemons: Daemons, rank: int, name: str) -> str:
    """Who made the plan of the last load of ``name``."""
    return [line for line in daemons[rank].events("load_finished") if line["model"] == name][-1]["planned_by"]


def load(ranks: Ranks, name: str, path: str, plan: bytes, **fields) -> shard_pb2.LoadedModel:
    """On rank 1, ``plan`` in parts, as the coordinator sends it."""
    request = shard_pb2.ShardLoadRequest(name=name, version="1", path=path, **fields)
    *_, last = ranks[1].stub.Load(with_plan(request, plan), timeout=60)
    return last.model


def expectations(held: shard_pb2.LoadedModel) -> dict[str, str]:
    return {f"expected_{part}_digest": getattr(held, f"{part}_digest") for part in ("source", "plan")}


def test_a_plan_is_exported_in_every_state(ranks: Ranks) -> None:
    rank = ranks[0]
    plan = rank.export_plan("mlp")
    assert rank.status().state == "NOPG"
    assert plan
    ranks.form()
    assert (rank.export_plan("mlp"), rank.status().state) == (plan, "READY")
    ranks.channels[0].send(seq=7, probe=shard_pb2.Probe())  # a gap
    wait_for(lambda: rank.status().state == "BROKEN", "the generation to end")
    assert rank.export_plan("mlp") == plan
    assert rank.fence(ranks.generation + 1).accepted
    assert (rank.export_plan("mlp"), rank.status().state) == (plan, "FENCED")


def test_what_is_not_held_has_no_plan(ranks: Ranks) -> None:
    assert code(lambda: ranks[0].export_plan("else")) is Code.NOT_FOUND
    assert code(lambda: ranks[0].export_plan("mlp", "2")) is Code.NOT_FOUND
    stream = ranks[0].load_stream("slow", SLOW)
    next(stream)
    assert code(lambda: ranks[0].export_plan("slow")) is Code.FAILED_PRECONDITION
    stream.cancel()
    wait_for(lambda: "slow" not in {model.name for model in ranks[0].status().models}, "the load to end")


def test_a_plan_does_not_wait_for_what_runs(ranks: Ranks, daemons: Daemons) -> None:
    gate = daemons.directory / "gate"
    ranks.load("moody", MOODY, options=coordinator_pb2.LoadOptions(verify=False))
    ranks.form()
    gate.touch()
    x = np.full((1, 16), shard_models.GATE, np.float32)
    ranks.send(execute=shard_pb2.ExecuteModel(model="moody", version="1", inputs=[wire("x", x)]))
    try:
        wait_for(lambda: ranks[0].status().busy_milliseconds, "the forward to run")
        assert ranks[0].export_plan("mlp", seconds=10)
        assert ranks[0].status().busy_milliseconds
    finally:
        gate.unlink()
    assert all(answer.HasField("execute") for answer in ranks.receive())


def test_a_load_with_a_peers_plan_makes_the_same(ranks: Ranks, daemons: Daemons) -> None:
    held = ranks.load("mlp", MLP)
    made = load(ranks, "twin", MLP, ranks[0].export_plan("mlp"), **expectations(held[1]))
    assert planned_by(daemons, 1, "twin") == "a peer"
    digests = [(model.source_digest, model.plan_digest, model.shard_digest) for model in (held[1], made)]
    assert digests[0] == digests[1]
    ranks[0].load("twin", MLP)
    assert planned_by(daemons, 0, "twin") == "this rank"
    ranks.form()
    first = array(ranks.execute("mlp", x=X)[0].execute.outputs[0])
    np.testing.assert_array_equal(array(ranks.execute("twin", x=X)[0].execute.outputs[0]), first)


def spoiled(plan: bytes) -> dict[str, bytes]:
    chance = random.Random(3)
    flipped = bytearray(plan)
    flipped[len(plan) // 2] ^= 1
    return {
        "truncated": plan[: len(plan) // 2],
        "flipped": bytes(flipped),
        "longer": plan + b"\0",
        "noise": chance.randbytes(1000),
        "large": chance.randbytes(5 << 20),
    }


@pytest.mark.parametrize("how", spoiled(b"  "))
def test_a_spoiled_plan_is_left_aside(ranks: Ranks, daemons: Daemons, how: str) -> None:
    held = ranks.load("mlp", MLP)
    plan = spoiled(ranks[0].export_plan("mlp"))[how]
    pid = ranks[1].status().pid
    made = load(ranks, how, MLP, plan, **expectations(held[1]))
    assert planned_by(daemons, 1, how) == "this rank"
    assert (made.plan_digest, made.shard_digest) == (held[1].plan_digest, held[1].shard_digest)
    assert ranks[1].status().pid == pid


def test_a_plan_of_another_model_or_of_nothing_known_is_left_aside(ranks: Ranks, daemons: Daemons) -> None:
    wide = coordinator_pb2.LoadOptions(arguments_json='{"hidden": 64}')
    [mine, _], [_, other] = ranks.load("mlp", MLP), ranks.load("wide", MLP, options=wide)
    plan = ranks[0].export_plan("mlp")
    made = load(ranks, "wide-again", MLP, plan, options=wide, **expectations(other))
    assert planned_by(daemons, 1, "wide-again") == "this rank"
    assert made.shard_digest == other.shard_digest
    load(ranks, "unexpected", MLP, plan)
    assert planned_by(daemons, 1, "unexpected") == "this rank"
    # Nor does it help to expect the wrong plan: that is refused, whoever made it.
    refused = {"options": wide, "expected_plan_digest": mine.plan_digest}
    assert code(lambda: load(ranks, "wrong", MLP, plan, **refused)) is Code.FAILED_PRECONDITION


def test_too_large_a_plan_is_refused(ranks: Ranks) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        load(ranks, "huge", MLP, bytes((64 << 20) + 1))
    assert refused.value.code() is Code.INVALID_ARGUMENT
    assert "64 MiB" in refused.value.details()


def test_a_caller_that_leaves_within_its_plan_leaves_nothing(ranks: Ranks, daemons: Daemons) -> None:
    def requests() -> Iterator[shard_pb2.ShardLoadRequest]:
        yield shard_pb2.ShardLoadRequest(name="left", version="1", path=MLP)
        call.cancel()
        yield shard_pb2.ShardLoadRequest(plan=b"more")

    call = ranks[1].stub.Load(requests(), timeout=20)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert "left" not in {model.name for model in ranks[1].status().models}


def test_a_load_as_before_there_were_plans(ranks: Ranks) -> None:
    """An older coordinator sends one request, where now a stream of them is taken."""
    method = "/tensor_parallel.v1.Shard/Load"
    request = shard_pb2.ShardLoadRequest(name="older", version="1", path=MLP)
    *_, last = ranks[1].grpc.unary_stream(method)(request.SerializeToString(), timeout=60)
    assert shard_pb2.ShardLoadProgress.FromString(last).stage == "loaded"


def test_no_plan_reaches_a_log(ranks: Ranks, daemons: Daemons) -> None:
    """Neither one that is left aside, nor one whose load fails."""
    held = ranks.load("mlp", MLP)
    secret = b"a-word-that-nothing-else-has"
    load(ranks, "quiet", MLP, secret * 1000, **expectations(held[1]))
    assert code(lambda: load(ranks, "failing", "tests.service.shard_models:nosuch", secret)) is Code.PERMISSION_DENIED
    log = daemons[1].log()
    assert "failing" in log
    assert secret.decode() not in log
    assert not daemons[1].events("internal_error")
