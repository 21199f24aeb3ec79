"""Plans on their way from a rank that holds a model to one that lacks it: in parts, which any limit lets through."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from protos.tensor_parallel.v1 import shard_pb2
from shardd.errors import InvalidRequest, LoadCancelled, WrongState

PART_BYTES = 64 << 10
MOST_BYTES = 64 << 20
"""Of a whole plan, out or in. A model of a hundred layers has a few MiB."""


def parts(plan: bytes) -> Iterator[shard_pb2.ExportPlanPart]:
    """What a rank answers with. Raises ``WrongState`` where a peer would not take it."""
    if len(plan) > MOST_BYTES:
        raise WrongState(f"the plan has more than {MOST_BYTES >> 20} MiB")
    for start in range(0, len(plan), PART_BYTES):
        yield shard_pb2.ExportPlanPart(data=plan[start : start + PART_BYTES])


def joined(requests: Iterator[shard_pb2.ShardLoadRequest]) -> shard_pb2.ShardLoadRequest:
    """The first request, with the plan that the others go on with. Raises ``InvalidRequest`` and ``LoadCancelled``."""
    plan: list[bytes] = []
    size = 0
    first: shard_pb2.ShardLoadRequest | None = None
    try:
        for request in requests:
            if first is not None and not request.plan:
                raise InvalidRequest("what follows the first request of a load are parts of a plan")
            first = request if first is None else first
            plan.append(request.plan)
            size += len(request.plan)
            if size > MOST_BYTES:
                raise InvalidRequest(f"the plan has more than {MOST_BYTES >> 20} MiB")
    except grpc.RpcError:  # all that gRPC tells of a caller who has left
        raise LoadCancelled("the load was cancelled") from None
    if first is None:
        raise InvalidRequest("the first request of a load says what to load")
    first.plan = b"".join(plan)
    return first
