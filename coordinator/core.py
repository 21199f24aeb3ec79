"""The coordinator itself, without a protocol: what every servicer and every test calls."""

from __future__ import annotations

from collections.abc import AsyncIterator

from coordinator.types import InferRequest, InferResult, ModelStatistics, RegionRef
from protos.tensor_parallel.v1 import coordinator_pb2 as pb


class Core:
    """One coordinator. Everything runs on the event loop that ``start`` ran on."""

    async def start(self) -> None:
        """Begins heartbeats and the first generation; returns at once."""
        raise NotImplementedError

    async def drain(self, seconds: float) -> None:
        """Refuses new work, lets what was accepted finish for at most ``seconds``, then leaves the ranks."""
        raise NotImplementedError

    async def forward(self, request: InferRequest) -> InferResult:
        """Raises ServiceError. Cancelling the caller drops the request unless it has been dispatched."""
        raise NotImplementedError

    def load(self, request: pb.LoadRequest, request_id: str = "") -> AsyncIterator[pb.LoadProgress]:
        """Loads beside what serves, then flips; the last message has stage SERVING. Raises ServiceError."""
        raise NotImplementedError

    async def unload(self, name: str) -> None:
        raise NotImplementedError

    async def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        raise NotImplementedError

    def models(self) -> list[pb.ModelInfo]:
        """Every model of the desired state, serving or not."""
        raise NotImplementedError

    def model(self, name: str, version: str = "") -> pb.ModelInfo:
        """Raises NotFound, or FailedPrecondition while the model is not loaded yet."""
        raise NotImplementedError

    def health(self) -> pb.HealthResponse:
        raise NotImplementedError

    def is_serving(self, name: str) -> bool | None:
        """``""``, ``"coordinator"`` or a model's name; None for a name that is none of them."""
        raise NotImplementedError

    def subscribe_health(self) -> AsyncIterator[None]:
        """Yields at once, and then whenever any answer of ``is_serving`` or ``health().reason`` may have changed."""
        raise NotImplementedError

    def statistics(self, name: str, version: str = "") -> dict[str, ModelStatistics]:
        """By version; all of them when ``version`` is empty. Raises NotFound."""
        raise NotImplementedError

    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None:
        raise NotImplementedError

    async def unregister_region(self, name: str) -> None:
        """All of them when ``name`` is empty."""
        raise NotImplementedError

    def regions(self) -> dict[str, tuple[str, RegionRef]]:
        """By name: the POSIX key, and offset and size within it."""
        raise NotImplementedError
