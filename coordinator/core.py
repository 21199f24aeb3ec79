"""The coordinator itself, without a protocol: what every servicer and every test calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import ParamSpec, TypeVar

import grpc

from coordinator.catalog import Catalog, ModelVersion
from coordinator.config import Config
from coordinator.desired import DesiredState
from coordinator.errors import from_rpc
from coordinator.fleet import Fleet
from coordinator.forwarding import Forwarder
from coordinator.generation import Ending, Generation
from coordinator.health import HealthView
from coordinator.loading import Loader
from coordinator.logging import get_logger
from coordinator.metrics import Metrics
from coordinator.rank import calling
from coordinator.regions import Regions, put
from coordinator.restoring import Restorer
from coordinator.types import InferRequest, InferResult, ModelStatistics, RegionRef
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import shard_pb2

PLAN_TIMEOUT = 600.0
OFF_LOOP = 256 << 10  # bytes; to and from clients' shared memory, copied on another thread from here on
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Core:
    """One coordinator. Everything runs on the event loop that it was made on."""

    def __init__(self, config: Config, metrics: Metrics, desired: DesiredState, owner: str) -> None:
        """Raises ConfigError when the desired state cannot be read. ``owner`` is this coordinator's identity."""
        self.config = config
        self.metrics = metrics
        self._desired = desired
        self._catalog = Catalog()
        self._statuses: list[shard_pb2.StatusResponse] = []
        self._adopting = not self._restore_desired()
        self._fleet = Fleet(
            config,
            self._catalog,
            metrics,
            owner,
            on_status=self._status_known,
            on_ready=self._generation_ready,
            on_ended=self._generation_ended,
            on_superseded=self._superseded,
        )
        self._forwarder = Forwarder(config, self._catalog, self._fleet, metrics)
        self._loader = Loader(config, self._catalog, self._fleet, desired, metrics)
        self._restorer = Restorer(config, self._catalog, self._fleet, self._loader)
        self._health = HealthView(config, self._catalog, self._fleet, self._forwarder)
        self._regions = Regions(config.shared_memory_prefix)
        self._reporter: asyncio.Task[None] | None = None
        metrics.watch(
            lambda: self._forwarder.queue.depth, lambda: self._forwarder.requests - self._forwarder.queue.depth
        )

    def _restore_desired(self) -> bool:
        """Whether there was a desired state. What ``--load`` names is added to it."""
        entries = self._desired.load(self.config.world_size)
        for entry in entries or []:
            self._catalog.current[entry.name] = entry
            self._catalog.note_version(entry.name, entry.version)
        for name, path in self.config.loads:
            known = self._catalog.current.get(name)
            if known is None or known.path != path:
                version = self._catalog.next_version(name)
                self._catalog.current[name] = ModelVersion(name, version, path, pb.LoadOptions())
                self._catalog.note_version(name, version)
        if entries:
            get_logger().info("state_restored", models=[entry.label for entry in entries])
        return entries is not None

    # ---- life

    def start(self) -> None:
        """Begins heartbeats and the first generation; returns at once."""
        self._fleet.start()
        self._reporter = asyncio.create_task(self._report_health())

    async def drain(self, seconds: float) -> None:
        """Refuses new work and lets what was accepted finish, for at most ``seconds``."""
        self._fleet.set_draining()
        get_logger().info("draining", requests=self._forwarder.requests, seconds=seconds)
        try:
            await asyncio.wait_for(self._forwarder.finished(), seconds)
        except TimeoutError:
            get_logger().warning("drain_cut_short", requests=self._forwarder.requests)

    async def stop(self) -> None:
        """Leaves the ranks; what is still in flight fails UNAVAILABLE."""
        if self._reporter is not None:
            self._reporter.cancel()
        self._fleet.set_draining()
        self._forwarder.queue.fail_all(self._fleet.unavailable)
        await self._restorer.close()
        await self._loader.stop()
        await self._fleet.stop()
        self._desired.close()

    def _status_known(self, statuses: list[shard_pb2.StatusResponse]) -> None:
        self._statuses = statuses
        if self._adopting:
            self._restorer.adopt(statuses)

    def _generation_ready(self, generation: Generation) -> None:
        self._adopting = False
        self._restorer.restore(generation, self._statuses)
        self._forwarder.queue.pump()

    def _generation_ended(self, ending: Ending) -> None:
        self._forwarder.generation_ended(ending)

    def _superseded(self) -> None:
        """Without a state file the ranks' next owner decides what they serve, and this coordinator takes it over."""
        if self._desired.path is None:
            self._catalog.current.clear()
            self._adopting = True

    # ---- work

    def forward(self, request: InferRequest) -> Awaitable[InferResult]:
        """Raises ServiceError. Cancelling the caller drops the request unless it has been dispatched."""
        shared = [value.region for value in request.inputs if value.region is not None]
        if shared or request.output_regions:
            return self._forward_shared(request, shared)
        return self._forwarder.run(request)

    async def _forward_shared(self, request: InferRequest, shared: list[RegionRef]) -> InferResult:
        """Inputs are taken from, or outputs put into, memory that the client shares."""
        self._forwarder.queue.check()
        inward = sum(region.byte_size for region in shared)
        generation = self._fleet.generation
        rooms = self._regions.rooms(request, generation.room) if generation is not None else {}
        targets = await _copying(inward, self._regions.take, request, rooms)
        del rooms
        result = await self._forwarder.run(request)
        outward = sum(value.byte_size for value in result.outputs if value.name in targets)
        await _copying(outward, put, result, request, targets)
        return result

    def load(self, request: pb.LoadRequest, request_id: str = "") -> AsyncGenerator[pb.LoadProgress, None]:
        """Loads beside what serves, then flips; the last message has stage SERVING. Raises ServiceError."""
        return self._loader.load(request, request_id)

    async def unload(self, name: str) -> None:
        """Raises NotFound."""
        await self._loader.unload(name)

    async def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        """Asked of the first rank that answers. Raises ServiceError."""
        rank = next((rank for rank in self._fleet.ranks if rank.alive), None)
        if rank is None:
            raise self._fleet.unavailable()
        asked = pb.PlanRequest()
        asked.CopyFrom(request)
        asked.ranks = request.ranks or self.config.world_size
        try:
            with calling():
                answer: pb.PlanResponse = await rank.stub.Plan(asked, timeout=PLAN_TIMEOUT, metadata=rank.metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        return answer

    # ---- what is known

    def models(self) -> list[pb.ModelInfo]:
        """Every model of the desired state, serving or not, by name."""
        return [self._info(self._catalog.current[name]) for name in sorted(self._catalog.current)]

    def model(self, name: str, version: str = "") -> pb.ModelInfo:
        """Raises NotFound, or FailedPrecondition during the model's first load."""
        return self._info(self._catalog.find(name, version))

    def _info(self, entry: ModelVersion) -> pb.ModelInfo:
        info = pb.ModelInfo(name=entry.name, version=entry.version, path=entry.path)
        if entry.info is not None:
            info.CopyFrom(entry.info)
        info.serving = bool(self._health.is_serving(entry.name))
        return info

    def statistics(self, name: str, version: str = "") -> dict[str, ModelStatistics]:
        """By version; every model's version that serves when ``version`` is empty. Raises NotFound."""
        entry = self._catalog.find(name, version)
        return {entry.version: entry.statistics}

    def health(self) -> pb.HealthResponse:
        return self._health.response()

    def is_serving(self, name: str) -> bool | None:
        """``""``, ``"coordinator"`` or a model's name; None for a name that is none of them."""
        return self._health.is_serving(name)

    def subscribe_health(self) -> AsyncIterator[None]:
        """Yields at once, and then whenever any answer of ``is_serving`` or ``health`` may have changed."""
        return self._fleet.changed.subscribe(1.0)

    async def _report_health(self) -> None:
        """Keeps the metrics as true as health is."""
        known: set[str] = set()
        async for _ in self.subscribe_health():
            self.metrics.serving.set(bool(self.is_serving("")))
            for name in self._catalog.current:
                self.metrics.set_model(name, bool(self.is_serving(name)))
            for name in known - set(self._catalog.current):
                self.metrics.forget_model(name)
            known = set(self._catalog.current)
            self.metrics.set_ranks([rank.alive for rank in self._fleet.ranks])

    # ---- clients' shared memory

    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """``key`` names a POSIX shared memory object. Raises ServiceError."""
        self._regions.register(name, key, offset, byte_size)

    async def unregister_region(self, name: str) -> None:
        """All of them when ``name`` is empty. Raises NotFound."""
        self._regions.unregister(name)

    def regions(self) -> dict[str, tuple[str, RegionRef]]:
        """By name: the POSIX key, and offset and size within it."""
        return self._regions.listed()


async def _copying(size: int, copy: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Large copies leave the event loop free."""
    if size < OFF_LOOP:
        return copy(*args, **kwargs)
    return await asyncio.to_thread(copy, *args, **kwargs)
