"""Whom the coordinator asks for a plan, and what it does without one: over real connections to scripted ranks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace

import grpc
import pytest

from coordinator import plans
from coordinator.catalog import ModelVersion
from coordinator.plans import exported_plan
from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2, shard_pb2_grpc

ENTRY = ModelVersion("m", "7", "path", coordinator_pb2.LoadOptions())
PLAN = bytes(range(256)) * 20_000  # 5 MiB: more than a message may have by default


class Survivor(shard_pb2_grpc.ShardServicer):
    """Answers with ``PLAN``, or as ``how`` says: with an error, with an error halfway, or not at all."""

    def __init__(self, how: str = "") -> None:
        self.how, self.asked, self.reached = how, 0, asyncio.Event()

    async def ExportPlan(self, request, context):
        assert (request.name, request.version) == ("m", "7")
        self.asked += 1
        self.reached.set()
        if self.how == "silence":
            await asyncio.sleep(60)
        for start in range(0, len(PLAN), 1 << 16):
            if start and self.how == "halfway":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            if self.how in grpc.StatusCode.__members__:
                await context.abort(grpc.StatusCode[self.how], "no")
            yield shard_pb2.ExportPlanPart(data=PLAN[start : start + (1 << 16)])


@contextlib.asynccontextmanager
async def ranks(*survivors: Survivor) -> AsyncIterator[list[SimpleNamespace]]:
    """Of each survivor its server, and the coordinator's connection to it."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for index, survivor in enumerate(survivors):
            server = grpc.aio.server()
            shard_pb2_grpc.add_ShardServicer_to_server(survivor, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            stub = shard_pb2_grpc.ShardStub(channel)
            made.append(SimpleNamespace(index=index, stub=stub, metadata=None, channel=channel))
        yield made


def asked_for(*survivors: Survivor) -> bytes:
    async def run() -> bytes:
        async with ranks(*survivors) as reached:
            return await exported_plan(reached, ENTRY)

    return asyncio.run(run())


def test_one_survivor_is_enough() -> None:
    first, second = Survivor(), Survivor()
    assert asked_for(first, second) == PLAN
    assert (first.asked, second.asked) == (1, 0)


@pytest.mark.parametrize("how", ["UNAVAILABLE", "UNIMPLEMENTED", "NOT_FOUND", "INTERNAL", "halfway"])
def test_the_next_is_asked_when_one_does_not_give_it(how: str) -> None:
    assert asked_for(Survivor(how), Survivor()) == PLAN


def test_what_cannot_be_passed_on_is_asked_for_once() -> None:
    first, second = Survivor("FAILED_PRECONDITION"), Survivor()
    assert asked_for(first, second) == b""
    assert second.asked == 0


def test_without_survivors_or_answers_there_is_no_plan() -> None:
    assert asked_for() == b""
    assert asked_for(Survivor("UNIMPLEMENTED"), Survivor("halfway")) == b""


def test_a_silent_survivor_is_waited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PATIENCE", 0.2)
    silent, late = Survivor("silence"), Survivor()
    assert asked_for(silent, late) == b""
    assert silent.asked == 1


def test_a_connection_given_up_is_no_cancelled_restore() -> None:
    """The silent rank's connection is closed while its plan is awaited; the next one is asked."""
    silent, second = Survivor("silence"), Survivor()

    async def run() -> bytes:
        async with ranks(silent, second) as reached:
            asking = asyncio.create_task(exported_plan(reached, ENTRY))
            await silent.reached.wait()
            await reached[0].channel.close()
            return await asking

    assert asyncio.run(run()) == PLAN
