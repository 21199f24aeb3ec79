"""One health port for all the daemons of a node: what a pod's probes ask."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.supervisor.child import Child
from coordinator.supervisor.loop import Supervisor
from coordinator.supervisor.probe import Answer, Probe

BOUND_SECONDS = 1.0


class NodeHealth(health_pb2_grpc.HealthServicer):
    """``grpc.health.v1`` in plaintext. "liveness": every daemon has answered once, and a supervisor is there to replace
    those that fail. "readiness" and "": every daemon is ready now, that is, in its group.

    Nothing is SERVING before `attach`. There is no Watch: whoever wants one asks the daemons.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._supervisor: Supervisor | None = None
        self._server = grpc.aio.server()

    async def start(self) -> None:
        """Raises OSError if the address cannot be listened on."""
        health_pb2_grpc.add_HealthServicer_to_server(self, self._server)
        try:
            bound = self._server.add_insecure_port(self._address)
        except RuntimeError:
            bound = 0
        if not bound:
            raise OSError(f"cannot listen on {self._address}")
        await self._server.start()

    def attach(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def stop(self) -> None:
        await self._server.stop(0.5)

    async def Check(self, request: Any, context: Any) -> Any:
        """One answer from what the daemons say within a second."""
        if request.service == "liveness":
            serving = self._supervisor is not None
        elif request.service in ("readiness", ""):
            serving = await self._ready()
        else:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        status = health_pb2.HealthCheckResponse
        return health_pb2.HealthCheckResponse(status=status.SERVING if serving else status.NOT_SERVING)

    async def _ready(self) -> bool:
        if self._supervisor is None:
            return False
        return all(await asyncio.gather(*(_is_ready(child) for child in self._supervisor.children)))


async def _is_ready(child: Child) -> bool:
    if not child.alive.is_set():
        return False
    async with Probe(child.spec.health, child.spec.liveness, child.spec.readiness) as probe:
        return await probe.ask(BOUND_SECONDS, readiness=True) is Answer.READY
