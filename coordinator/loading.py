"""Loading, flipping and unloading models.

A new version is loaded on every rank beside what serves, its digests are compared, and one ordered command activates
it; then the catalog flips, the desired state is written, and the old version leaves after its last request. Every
failure before the flip leaves what served before untouched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc

from coordinator.catalog import Catalog, Digests, ModelVersion, disagreement, held
from coordinator.commands import Activate, Unload
from coordinator.config import Config
from coordinator.desired import DesiredState
from coordinator.errors import FailedPrecondition, InvalidArgument, NotFound, ServiceError, Unavailable
from coordinator.fleet import Fleet
from coordinator.formation import gather
from coordinator.generation import RETRY_MS, Generation
from coordinator.joining import prove
from coordinator.logging import bound, get_logger
from coordinator.metrics import Metrics
from coordinator.rank_loads import RankLoads, forget
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import shard_pb2

ACTIVATE_PATIENCE = 60.0  # seconds that what has been loaded waits for a generation to serve in
PROGRESS_INTERVAL = 0.1  # seconds between messages of a load at most
MAX_NAME = 256
RESERVED = ("coordinator", "liveness", "readiness")


class Loader:
    def __init__(self, config: Config, catalog: Catalog, fleet: Fleet, desired: DesiredState, metrics: Metrics) -> None:
        self._config = config
        self._catalog = catalog
        self._fleet = fleet
        self._desired = desired
        self._metrics = metrics
        for entry in desired.unloaded:
            catalog.note_unloaded(entry)
            catalog.note_version(entry.name, entry.version)
        self._background: set[asyncio.Task[None]] = set()
        self.on_replaced: Callable[[str], None] = lambda name: None
        """Called with a name whose version was replaced or unloaded."""

    # ---- a client's load

    async def load(self, request: pb.LoadRequest, request_id: str = "") -> AsyncGenerator[pb.LoadProgress, None]:
        """Progress, the last message SERVING. Raises ServiceError. Closing the iterator cancels, but not the flip."""
        entry = self._begin(request)
        stages: asyncio.Queue[pb.LoadProgress | None] = asyncio.Queue()
        report = _Report(entry, stages.put_nowait)
        with bound(request_id=request_id):
            task = asyncio.create_task(self._load(entry, report))
        task.add_done_callback(lambda _: stages.put_nowait(None))
        try:
            last = 0.0
            while (message := await stages.get()) is not None:
                now = asyncio.get_running_loop().time()
                if stages.empty() or message.stage >= pb.LoadProgress.LOADED or now - last > PROGRESS_INTERVAL:
                    last = now
                    yield message
            await task
        finally:
            if not report.committed:
                task.cancel()
            await asyncio.gather(asyncio.shield(task), return_exceptions=True)

    def _begin(self, request: pb.LoadRequest) -> ModelVersion:
        name = request.name
        if not name or len(name) > MAX_NAME or not name.isprintable() or name in RESERVED:
            raise InvalidArgument(f"{name!r} cannot be the name of a model")
        path, options = self._source(request)
        if len(request.version) > MAX_NAME or not request.version.isprintable():
            raise InvalidArgument("version must be short and printable")
        self._fleet.ready()
        if name in self._catalog.loading:
            raise FailedPrecondition(f"model {self._catalog.loading[name].label} is being loaded; wait for it")
        version = request.version or self._catalog.next_version(name)
        if (name, version) in self._catalog.wanted():
            raise FailedPrecondition(f"model {name}@{version} is there already; load it under another version")
        entry = ModelVersion(name, version, path, options)
        self._catalog.note_version(name, version)
        self._catalog.loading[name] = entry
        return entry

    def _source(self, request: pb.LoadRequest) -> tuple[str, pb.LoadOptions]:
        """Without a path: what the name stands for already, with the options it had and those now given."""
        options = pb.LoadOptions()
        known = self._catalog.last(request.name)
        if request.path:
            options.CopyFrom(request.options)
            return request.path, options
        if known is None:
            raise InvalidArgument(
                f"path is empty, and nothing was loaded under {request.name!r} before: "
                "it names what to load, within the daemons' model root"
            )
        options.CopyFrom(known.options)
        options.MergeFrom(request.options)
        return known.path, options

    async def _load(self, entry: ModelVersion, report: _Report) -> None:
        log = get_logger(model=entry.label)
        loop = asyncio.get_running_loop()
        started = loop.time()
        log.info("load_started", path=entry.path)
        try:
            loads = RankLoads(
                self._fleet.ranks,
                entry,
                None,
                self.lease(),
                self._config.load_stall,
                lambda: report.progress(loads),
            )
            loaded = await loads.run()
            self.agree(entry, loaded, None)
            report.stage(pb.LoadProgress.LOADED, loads)
            if loads.warnings and entry.info is not None:
                entry.info.warnings.extend(w for w in loads.warnings if w not in entry.info.warnings)
            generation = await self.activate(entry, report)
            await prove(entry, generation)
            await self._flip(entry, generation)
            report.stage(pb.LoadProgress.SERVING, loads)
        except BaseException as error:
            self._catalog.loading.pop(entry.name, None)
            self.spawn(self._free(entry))
            log.warning("load_failed", error=str(error) or type(error).__name__, seconds=loop.time() - started)
            result = error.code.name if isinstance(error, ServiceError) else "CANCELLED"
            self._metrics.load_seconds.labels(result).observe(loop.time() - started)
            raise
        finally:
            self._catalog.loading.pop(entry.name, None)
            self._fleet.changed.ring()
        log.info("load_finished", seconds=loop.time() - started, warnings=loads.warnings)
        self._metrics.load_seconds.labels("OK").observe(loop.time() - started)

    def agree(self, entry: ModelVersion, loaded: dict[int, shard_pb2.LoadedModel], expected: Digests | None) -> None:
        difference = disagreement(sorted(loaded.items()), expected)
        if difference:
            raise FailedPrecondition(f"model {entry.label} cannot be served: {difference}")
        entry.adopt([loaded[rank] for rank in sorted(loaded)], self._config)

    async def activate(self, entry: ModelVersion, report: _Report | None = None) -> Generation:
        """What is loaded outlives a generation, so the flip waits for the next one if it must."""
        while True:
            generation = await self._fleet.await_ready(ACTIVATE_PATIENCE)
            for rank, status in zip(self._fleet.ranks, await self.statuses(), strict=True):
                if held(status, entry.name, entry.version) is None:
                    raise Unavailable(f"rank {rank.index} lost what it had loaded", retry_after_ms=RETRY_MS)
            if report is not None:
                report.committed = True
            try:
                await generation.dispatch(Activate(entry.name, entry.version))
                return generation
            except Unavailable:
                if generation.alive:
                    raise

    async def statuses(self) -> list[shard_pb2.StatusResponse]:
        """Of every rank, now. Raises Unavailable."""
        try:
            return await gather([rank.ask_status(self.lease()) for rank in self._fleet.ranks])
        except grpc.RpcError as error:
            raise Unavailable(f"a rank does not answer: {error.details()}", retry_after_ms=RETRY_MS) from None

    async def _flip(self, entry: ModelVersion, generation: Generation) -> None:
        previous = self._catalog.current.get(entry.name)
        entry.live_in, entry.served = generation.number, True
        self._catalog.current[entry.name] = entry
        if previous is not None:
            self._retire(previous)
        self.on_replaced(entry.name)
        await asyncio.gather(self._fleet.refresh(), self.save())

    async def save(self) -> None:
        """Writes the desired state, off the event loop. Raises Unavailable when the disk refuses."""
        models = list(self._catalog.current.values())
        try:
            unloaded = list(self._catalog.unloaded.values())
            await asyncio.to_thread(self._desired.save, models, self._config.world_size, unloaded)
        except OSError as error:
            get_logger().error("state_not_saved", error=str(error))
            raise Unavailable(f"the desired state could not be written: {error.strerror}") from None

    # ---- leaving

    async def unload(self, name: str) -> None:
        """Forgets the model at once; its last requests finish, then the ranks free it. Raises NotFound."""
        entry = self._catalog.current.pop(name, None)
        if entry is None:
            loading = self._catalog.loading.get(name)
            if loading is not None:
                raise FailedPrecondition(f"model {loading.label} is being loaded; cancel that first")
            raise NotFound(f"there is no model {name!r}")
        self._catalog.note_unloaded(entry)
        self.on_replaced(name)
        self._metrics.forget_model(name)
        get_logger().info("unload", model=entry.label)
        self._fleet.changed.ring()
        await self.save()
        await asyncio.shield(self._retire(entry))

    def _retire(self, entry: ModelVersion) -> asyncio.Task[None]:
        self._catalog.retiring.append(entry)
        return self.spawn(self._leave(entry))

    async def _leave(self, entry: ModelVersion) -> None:
        """Unloads after the last request. A generation that ends takes these with it, and the next one unloads."""
        try:
            generation = self._fleet.generation
            while entry.users and generation is not None and generation.alive:
                await self._fleet.changed.wait(self._config.heartbeat)
        finally:
            self._catalog.retiring.remove(entry)
        await self._free(entry)

    async def _free(self, entry: ModelVersion) -> None:
        """In order with everything else where the version may be executed; beside it where it never could."""
        generation = self._fleet.generation
        if generation is None or (entry.name, entry.version) in self._catalog.wanted():
            return
        if entry.live_in != generation.number:
            await forget(self._fleet.ranks, entry.name, entry.version)
            return
        try:
            await generation.dispatch(Unload(entry.name, entry.version))
            await self._fleet.refresh()
        except ServiceError as error:
            get_logger().info("unload_interrupted", model=entry.label, error=error.message)

    # ---- small things

    def lease(self) -> shard_pb2.Lease:
        return shard_pb2.Lease(owner=self._fleet.owner, duration_milliseconds=round(self._config.lease * 1e3))

    def spawn(self, job: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(job)  # type: ignore[call-overload]
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def stop(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)


class _Report:
    """Progress messages of one load."""

    def __init__(self, entry: ModelVersion, send: Callable[[pb.LoadProgress], None]) -> None:
        self._entry = entry
        self._send = send
        self.committed = False

    def progress(self, loads: RankLoads) -> None:
        reading = any(progress.bytes_done for progress in loads.progress.values())
        self.stage(pb.LoadProgress.READING if reading else pb.LoadProgress.PLANNING, loads)

    def stage(self, stage: pb.LoadProgress.Stage, loads: RankLoads) -> None:
        message = pb.LoadProgress(
            stage=stage,
            name=self._entry.name,
            version=self._entry.version,
            ranks=[loads.progress[rank] for rank in sorted(loads.progress)],
            warnings=loads.warnings,
        )
        if stage == pb.LoadProgress.SERVING and self._entry.info is not None:
            message.model.CopyFrom(self._entry.info)
            message.model.serving = True
        self._send(message)
