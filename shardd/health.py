"""``grpc.health.v1``: "liveness" (the process does not need replacing), "readiness" and "" (it is in its group)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import HealthServicer

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The three names, set from recorded state; watchers hear of each change and hold no thread."""

    def __init__(self) -> None:
        self._watchers = ThreadPoolExecutor(1, thread_name_prefix="health-watch")
        self.servicer = HealthServicer(experimental_non_blocking=True, experimental_thread_pool=self._watchers)
        self._told: dict[str, bool] = {}
        self.show(live=True, ready=False)

    def show(self, *, live: bool, ready: bool) -> None:
        for name, serving in (("liveness", live), ("readiness", ready and live), ("", ready and live)):
            if self._told.get(name) is not serving:
                self._told[name] = serving
                self.servicer.set(name, _SERVING if serving else _NOT_SERVING)

    def close(self) -> None:
        self._watchers.shutdown(wait=False)
