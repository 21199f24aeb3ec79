"""The plan of a model, from a rank that holds it to those that have to load it. It saves them the planning, and
nothing depends on it: whoever has none, or cannot use what it is given, plans by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

import grpc

from coordinator.catalog import ModelVersion
from coordinator.logging import get_logger
from coordinator.rank import Rank, calling
from protos.tensor_parallel.v1 import shard_pb2

PATIENCE = 5.0  # seconds for all survivors together
PART_BYTES = 64 << 10
MOST_BYTES = 64 << 20  # a rank takes no more


async def exported_plan(survivors: Iterable[Rank], entry: ModelVersion) -> bytes:
    """Of the first survivor that gives it; empty when none does."""
    log = get_logger(model=entry.label)
    deadline = asyncio.get_running_loop().time() + PATIENCE
    for rank in survivors:
        try:
            with calling():
                plan = await _ask(rank, entry, deadline - asyncio.get_running_loop().time())
        except grpc.RpcError as error:
            log.info("plan_not_exported", rank=rank.index, code=error.code().name, error=error.details())
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                break  # it cannot be passed on, and the others hold the same
        else:
            log.info("plan_exported", rank=rank.index, bytes=len(plan))
            return plan
    return b""


async def _ask(rank: Rank, entry: ModelVersion, seconds: float) -> bytes:
    """Raises grpc.RpcError."""
    request = shard_pb2.ExportPlanRequest(name=entry.name, version=entry.version)
    call = rank.stub.ExportPlan(request, timeout=seconds, metadata=rank.metadata)
    plan = bytearray()
    async for part in call:
        plan += part.data
        if len(plan) > MOST_BYTES:
            call.cancel()
            return b""
    return bytes(plan)


def with_plan(request: shard_pb2.ShardLoadRequest, plan: bytes) -> Iterator[shard_pb2.ShardLoadRequest]:
    """The requests of a Load, in parts that any limit on the size of messages lets through."""
    yield request
    for start in range(0, len(plan), PART_BYTES):
        yield shard_pb2.ShardLoadRequest(plan=plan[start : start + PART_BYTES])
