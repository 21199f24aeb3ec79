"""Plans in parts: out of a daemon, and together again in another."""

from __future__ import annotations

import grpc
import pytest

from coordinator.plans import with_plan
from protos.tensor_parallel.v1 import shard_pb2
from shardd.errors import InvalidRequest, LoadCancelled, WrongState
from shardd.plans import MOST_BYTES, PART_BYTES, joined, parts


def request() -> shard_pb2.ShardLoadRequest:
    return shard_pb2.ShardLoadRequest(name="m", version="1", path="p")


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 5 << 20])
def test_what_goes_out_in_parts_comes_in_whole(size: int) -> None:
    plan = bytes(index % 251 for index in range(1000)) * (size // 1000 + 1)
    plan = plan[:size]
    out = list(parts(plan))
    assert all(0 < len(part.data) <= PART_BYTES for part in out)
    assert b"".join(part.data for part in out) == plan
    whole = joined(with_plan(request(), plan))
    assert (whole.name, whole.version, whole.path, whole.plan) == ("m", "1", "p", plan)


def test_a_plan_in_one_request_with_the_rest() -> None:
    assert joined(iter([shard_pb2.ShardLoadRequest(name="m", plan=b"plan")])).plan == b"plan"


def test_no_request_and_too_long_a_plan_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="first request"):
        joined(iter(()))
    with pytest.raises(InvalidRequest, match="64 MiB"):
        joined(with_plan(request(), bytes(MOST_BYTES + 1)))
    with pytest.raises(WrongState, match="64 MiB"):
        next(parts(bytes(MOST_BYTES + 1)))


def test_a_caller_that_leaves_halfway_has_cancelled() -> None:
    def requests():
        yield request()
        raise grpc.RpcError

    with pytest.raises(LoadCancelled):
        joined(requests())
