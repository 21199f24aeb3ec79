"""One health port for all daemons of a node, which answer on sockets of their own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from coordinator.supervisor.node_health import NodeHealth

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Daemon:
    """A daemon as a supervisor sees it: whether it has answered once, and where its health is served."""

    def __init__(self, address: str) -> None:
        self.spec = SimpleNamespace(health=address, liveness="liveness", readiness="readiness")
        self.alive = asyncio.Event()
        self.alive.set()
        self.health = health.HealthServicer()
        self.health.set("liveness", SERVING)
        self.server = grpc.server(ThreadPoolExecutor(2))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.server.add_insecure_port(address)
        self.server.start()

    def ready(self, is_ready: bool = True) -> None:
        self.health.set("readiness", SERVING if is_ready else NOT_SERVING)


@asynccontextmanager
async def node(tmp_path: Path, count: int = 2):
    daemons = [Daemon(f"unix:{tmp_path}/{number}") for number in range(count)]
    served = NodeHealth(f"unix:{tmp_path}/node")
    await served.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/node") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(service: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)).status

        yield served, daemons, check
    await served.stop()
    for daemon in daemons:
        daemon.server.stop(None)


def supervising(daemons):
    return SimpleNamespace(children=daemons)


def test_it_is_ready_while_every_daemon_is(tmp_path):
    async def run():
        async with node(tmp_path) as (served, daemons, check):
            assert [await check(name) for name in ("liveness", "readiness", "")] == [NOT_SERVING] * 3
            served.attach(supervising(daemons))
            assert await check("liveness") == SERVING
            assert await check("readiness") == NOT_SERVING
            daemons[0].ready()
            assert await check("") == NOT_SERVING
            daemons[1].ready()
            assert [await check("readiness"), await check("")] == [SERVING, SERVING]
            daemons[0].ready(False)
            assert await check("readiness") == NOT_SERVING

    asyncio.run(run())


def test_one_that_does_not_answer_is_not_ready_and_the_node_lives(tmp_path):
    async def run():
        async with node(tmp_path) as (served, daemons, check):
            for daemon in daemons:
                daemon.ready()
            served.attach(supervising(daemons))
            assert await check("readiness") == SERVING
            daemons[1].server.stop(None).wait(10)
            assert await check("readiness") == NOT_SERVING
            assert await check("liveness") == SERVING

    asyncio.run(run())


def test_one_that_has_never_answered_is_not_asked(tmp_path):
    async def run():
        async with node(tmp_path, count=1) as (served, daemons, check):
            daemons[0].ready()
            daemons[0].alive.clear()
            served.attach(supervising(daemons))
            assert await check("readiness") == NOT_SERVING

    asyncio.run(run())


def test_other_names_are_unknown(tmp_path):
    async def run():
        async with node(tmp_path, count=0) as (_, _, check):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await check("mlp")
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
            assert "'mlp'" in error.value.details()

    asyncio.run(run())


@pytest.mark.parametrize("address", ["192.0.2.1:0", "unix:/no/such/directory/socket"])
def test_an_address_that_cannot_be_had_is_said(address):
    async def run():
        with pytest.raises(OSError, match="cannot listen on"):
            await NodeHealth(address).start()

    asyncio.run(run())
