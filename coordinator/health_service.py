"""``grpc.health.v1.Health``: Check and Watch, from the same truth as everything else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from coordinator.core import Core
from coordinator.errors import MAX_MESSAGE

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
SERVICE = "grpc.health.v1.Health"


class HealthService(health_pb2_grpc.HealthServicer):
    """Names: "" (everything), "coordinator" (it answers requests), "liveness" (it runs), and each model's."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def _status(self, name: str) -> int:
        serving = self._core.is_serving(name)
        if serving is None:
            return int(pb.HealthCheckResponse.SERVICE_UNKNOWN)
        return int(pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING)

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        status = self._status(request.service)
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}"[:MAX_MESSAGE])
        return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: Context) -> AsyncIterator[pb.HealthCheckResponse]:
        last: int | None = None
        async for _ in self._core.subscribe_health():
            status = self._status(request.service)
            if status != last:
                last = status
                yield pb.HealthCheckResponse(status=status)
