"""Models coming back: after a rank was replaced, after the coordinator was, after everything was.

What every rank still holds serves again with the generation itself. The rest is loaded where it lacks, beside what
serves, and a replacement must come to the weights that the survivors hold.
"""

from __future__ import annotations

import asyncio
import functools

from coordinator.catalog import HELD, Catalog, Digests, ModelVersion, held
from coordinator.config import Config
from coordinator.errors import FailedPrecondition, Unavailable, describe
from coordinator.fleet import Fleet
from coordinator.generation import Generation
from coordinator.joining import prove
from coordinator.loading import Loader
from coordinator.logging import get_logger
from coordinator.plans import exported_plan
from coordinator.rank import Rank
from coordinator.rank_loads import RankLoads, forget
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import shard_pb2

RETRY_FIRST, RETRY_MOST = 0.2, 10.0  # seconds between attempts


class Restorer:
    def __init__(self, config: Config, catalog: Catalog, fleet: Fleet, loader: Loader) -> None:
        self._config = config
        self._catalog = catalog
        self._fleet = fleet
        self._loader = loader
        self._tasks: dict[str, asyncio.Task[None]] = {}
        loader.on_replaced = self.stop

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def adopt(self, statuses: list[shard_pb2.StatusResponse]) -> None:
        """Without a desired state: what is active on every rank is what was being served."""
        for model in statuses[0].models:
            everywhere = [held(status, model.name, model.version) for status in statuses]
            if model.state != "ACTIVE" or any(copy is None for copy in everywhere):
                continue
            known = self._catalog.current.get(model.name)
            if known is not None and _order(known.version) >= _order(model.version):
                continue
            options = pb.LoadOptions(batching=model.info.batching)
            entry = ModelVersion(model.name, model.version, model.info.path, options, served=True)
            self._catalog.current[model.name] = entry
            self._catalog.note_version(model.name, model.version)
            get_logger().info("model_adopted", model=entry.label)

    def restore(self, generation: Generation, statuses: list[shard_pb2.StatusResponse]) -> None:
        """In a new generation: loads what is wanted and missing, frees what is there and unwanted."""
        strays = {(model.name, model.version) for status in statuses for model in status.models if model.state in HELD}
        for name, version in strays - self._catalog.wanted():
            self._loader.spawn(forget(self._fleet.ranks, name, version))
        for entry in self._catalog.current.values():
            if entry.live_in == generation.number:
                entry.served = True
                self._loader.spawn(prove(entry, generation))
            elif entry.name not in self._tasks:
                self._start(entry)

    def _start(self, entry: ModelVersion) -> None:
        task = asyncio.create_task(self._restore(entry))
        self._tasks[entry.name] = task
        task.add_done_callback(functools.partial(self._done, entry.name))

    def _done(self, name: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]

    def stop(self, name: str) -> None:
        """The version being restored under ``name`` is no longer wanted."""
        task = self._tasks.pop(name, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _restore(self, entry: ModelVersion) -> None:
        """Until the model is live, or waiting cannot help."""
        pause = RETRY_FIRST
        log = get_logger(model=entry.label)
        while self._catalog.current.get(entry.name) is entry:
            if self._fleet.generation is None:
                await self._fleet.changed.wait(1.0)
                continue
            try:
                await self._restore_once(entry)
            except Exception as raised:
                error = describe(raised, f"(restore of {entry.label})")
                if error.retry_after_ms is None and not isinstance(error, Unavailable):
                    entry.failure = error.message
                    log.error("restore_failed", error=error.message)
                    self._fleet.changed.ring()
                    return
                log.warning("restore_delayed", error=error.message)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MOST)
                continue
            log.info("model_restored", generation=entry.live_in)
            await asyncio.gather(self._fleet.refresh(), self._loader.save(), return_exceptions=True)
            return

    async def _restore_once(self, entry: ModelVersion) -> None:
        statuses = await self._loader.statuses()
        loaded = {
            rank: model for rank, status in enumerate(statuses) if (model := held(status, entry.name, entry.version))
        }
        lacking = [rank for rank in self._fleet.ranks if rank.index not in loaded]
        known = entry.digests
        expected = known if loaded else None
        if loaded and expected is None:
            survivor = next(iter(loaded.values()))
            expected = Digests(survivor.source_digest, survivor.plan_digest)
        try:
            loaded |= await self._load(entry, expected, lacking, [self._fleet.ranks[rank] for rank in loaded])
        except FailedPrecondition as error:
            raise FailedPrecondition(_explain(error, entry, bool(loaded))) from None
        self._loader.agree(entry, loaded, expected)
        if known is not None and entry.digests is not None and known.source != entry.digests.source:
            warning = "the checkpoint has changed on disk since this version was first loaded"
            get_logger().warning("checkpoint_changed", model=entry.label, path=entry.path)
            if entry.info is not None:
                entry.info.warnings.append(warning)
        generation = await self._loader.activate(entry)
        await prove(entry, generation)
        entry.failure, entry.live_in, entry.served = "", generation.number, True

    async def _load(
        self, entry: ModelVersion, expected: Digests | None, lacking: list[Rank], survivors: list[Rank]
    ) -> dict[int, shard_pb2.LoadedModel]:
        """On the ranks that lack it, with what the survivors planned: planning is most of a load."""
        plan = await exported_plan(survivors, entry) if lacking else b""
        loads = RankLoads(lacking, entry, expected, self._loader.lease(), self._config.load_stall, lambda: None, plan)
        return await loads.run()


def _order(version: str) -> tuple[int, str]:
    return (int(version), "") if version.isdecimal() else (-1, version)


def _explain(error: FailedPrecondition, entry: ModelVersion, survivors: bool) -> str:
    if not survivors:
        return error.message
    return (
        f"{error.message}. The surviving ranks still hold the weights that were loaded first; "
        f"put the checkpoint at {entry.path!r} back as it was, or load it as a new version of {entry.name!r}"
    )
