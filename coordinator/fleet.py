"""The ranks as one whole: heartbeats, and a generation that is formed again whenever one ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence

import grpc

from coordinator.catalog import Catalog
from coordinator.changes import Signal
from coordinator.commands import Probe
from coordinator.config import Config
from coordinator.errors import Unavailable
from coordinator.formation import Formation, FormationFailed, Superseded
from coordinator.generation import RETRY_MS, Ending, Generation
from coordinator.logging import get_logger
from coordinator.metrics import Metrics
from coordinator.rank import Rank
from protos.tensor_parallel.v1 import shard_pb2 as pb

FORMING, READY, BROKEN, STANDBY, DRAINING = "FORMING", "READY", "BROKEN", "STANDBY", "DRAINING"
RETRY_FIRST, RETRY_MOST = 0.02, 0.5  # seconds between attempts to form a generation
TAKEOVER_JITTER = 0.2  # seconds: two coordinators in standby should not reach for the ranks in step


class Fleet:
    """``on_status`` sees the ranks' statuses before each generation, ``on_ready`` and ``on_ended`` each generation.

    ``on_superseded``: another coordinator owns the ranks now, and may change what they serve.
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        metrics: Metrics,
        owner: str,
        *,
        on_status: Callable[[list[pb.StatusResponse]], None],
        on_ready: Callable[[Generation], None],
        on_ended: Callable[[Ending], None],
        on_superseded: Callable[[], None],
    ) -> None:
        self.owner = owner
        self.state = FORMING
        self.reason = "the coordinator is starting"
        self.number = 0
        self.changed = Signal()
        self.ranks = [Rank(i, address, config, self._rank_changed) for i, address in enumerate(config.shards)]
        self._config = config
        self._catalog = catalog
        self._metrics = metrics
        self._on_status = on_status
        self._on_ready = on_ready
        self._on_ended = on_ended
        self._on_superseded = on_superseded
        self._generation: Generation | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        beats = [rank.beat(self._lease) for rank in self.ranks]
        self._tasks = [asyncio.create_task(job) for job in (*beats, self._run(), self._watch())]

    async def stop(self) -> None:
        """Leaves the ranks: ends the generation and gives the lease back, so that a successor need not wait for it."""
        ours = self._generation.number if self._generation is not None else None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._generation is not None:
            self._generation.end(Ending("stopped", "the coordinator is stopping"))
        release = pb.Lease(owner=self.owner, duration_milliseconds=0)
        for rank in self.ranks:
            if ours is not None and rank.alive and rank.status is not None and rank.status.highest_generation == ours:
                with contextlib.suppress(grpc.RpcError):
                    await rank.ask_status(release)
            await rank.close()

    @property
    def generation(self) -> Generation | None:
        """The one that is READY, if any."""
        generation = self._generation
        return generation if generation is not None and generation.alive else None

    @property
    def _unfinished(self) -> Generation | None:
        """The one that has not ended: READY, or waiting for its last answers."""
        generation = self._generation
        return generation if generation is not None and not generation.ended.done() else None

    @property
    def knows_models(self) -> bool:
        """Whether this coordinator can tell which models there are: it owned the ranks, and no other does."""
        return self.number > 0 and self.state != STANDBY

    def ready(self) -> Generation:
        """Raises Unavailable, naming the rank and the reason."""
        generation = self.generation
        if generation is None or self.state == DRAINING:
            raise self.unavailable()
        return generation

    async def await_ready(self, seconds: float) -> Generation:
        """The generation, once there is one. Raises Unavailable after ``seconds``."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.generation is None:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 or self.state in (STANDBY, DRAINING):
                break
            await self.changed.wait(left)
        return self.ready()

    def unavailable(self) -> Unavailable:
        return Unavailable(f"not serving ({self.state}): {self.why()}", retry_after_ms=RETRY_MS)

    def why(self) -> str:
        """Why there is no generation; a rank that does not answer is the first thing to say."""
        if self.state in (STANDBY, DRAINING):
            return self.reason
        lost = [f"rank {rank.index} does not answer ({rank.error})" for rank in self.ranks if not rank.alive]
        return "; ".join(lost) or self.reason

    def behind(self, ranks: Sequence[int]) -> list[int]:
        """Those of ``ranks``, which owe an answer, that the others wait for, as far as heartbeats have told."""
        begun = {index: status.collectives for index in ranks if (status := self.ranks[index].status) is not None}
        fewest = min(begun.values(), default=0)
        return [index for index in ranks if begun.get(index, fewest) == fewest]

    async def refresh(self) -> None:
        """Asks every rank for its status now, so that health tells what a change has just made true."""
        beats = [rank.ask_status(self._lease()) for rank in self.ranks if rank.alive]
        await asyncio.gather(*beats, return_exceptions=True)
        self.changed.ring()

    def set_draining(self) -> None:
        self._set(DRAINING, "the coordinator is draining")

    def _lease(self) -> pb.Lease:
        if self.state == STANDBY:
            return pb.Lease()
        return pb.Lease(owner=self.owner, duration_milliseconds=round(self._config.lease * 1e3))

    def _set(self, state: str, reason: str) -> None:
        if self.state == DRAINING or (state, reason) == (self.state, self.reason):
            return
        if reason and state != READY:
            log = get_logger().info if state == FORMING else get_logger().warning
            log({STANDBY: "superseded"}.get(state, "not_ready"), state=state, reason=reason)
        self.state, self.reason = state, reason
        self.changed.ring()

    def _rank_changed(self, rank: Rank) -> None:
        generation = self._unfinished
        if generation is not None and not rank.alive:
            generation.end(Ending("rank_lost", f"rank {rank.index} was lost: {rank.error}", rank.index))
        elif generation is not None and rank.restarts:
            status = rank.status
            if status is not None and status.highest_generation < generation.number:
                generation.end(Ending("rank_lost", f"rank {rank.index} was restarted", rank.index))
        if generation is not None and rank.draining:
            self._let_go(generation, rank)
        self.changed.ring()

    def _let_go(self, generation: Generation, rank: Rank) -> None:
        """``rank`` drains: what it was given is finished, it is given nothing more, and it need not wait."""
        reason = f"rank {rank.index} is draining"
        if generation.alive:
            self._set(BROKEN, reason)
            generation.leave(Ending("draining", reason, rank.index))

    # ---- the recovery loop

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause = RETRY_FIRST
        since = loop.time()
        while self.state != DRAINING:
            try:
                await self._everyone_alive()
                generation = await self._form()
            except FormationFailed as error:
                self._set(BROKEN if self.state == BROKEN else FORMING, str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MOST)
                continue
            except Superseded as error:
                await self._stand_by(error)
                continue
            pause = RETRY_FIRST
            self._begin(generation, loop.time() - since)
            ending = await asyncio.shield(generation.ended)
            since = loop.time()
            self._finish(generation, ending)

    async def _form(self) -> Generation:
        """One attempt, given up as soon as a rank is lost: whoever waits for that rank need not wait longer."""
        formation = Formation(self.ranks, self._config, self.owner, self.reason, self.number)
        task = asyncio.create_task(formation.run(self._catalog, self._on_status))
        try:
            while not task.done():
                lost = next((rank for rank in self.ranks if not rank.alive), None)
                if lost is not None:
                    raise FormationFailed(f"rank {lost.index} was lost: {lost.error}")
                bell = asyncio.create_task(self.changed.wait(1.0))
                await asyncio.wait((task, bell), return_when=asyncio.FIRST_COMPLETED)
                bell.cancel()
            generation = task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self.refresh()
        return generation

    def _begin(self, generation: Generation, seconds: float) -> None:
        self._generation, self.number = generation, generation.number
        get_logger().info(
            "generation_ready", generation=generation.number, seconds=seconds, channels=generation.channel_kinds
        )
        self._metrics.generation.set(generation.number)
        self._metrics.recovery_seconds.observe(seconds)
        self._set(READY, "")
        self._on_ready(generation)

    def _finish(self, generation: Generation, ending: Ending) -> None:
        self._metrics.generation_ended(ending.kind)
        if ending.rank is not None and ending.disconnected:
            self.ranks[ending.rank].lost(ending.disconnected)
        self._set(BROKEN, f"generation {generation.number} has ended: {ending.reason}")
        self._on_ended(ending)

    async def _everyone_alive(self) -> None:
        async for _ in self.changed.subscribe(1.0):
            if all(rank.alive and not rank.draining for rank in self.ranks):
                return

    async def _stand_by(self, superseded: Superseded) -> None:
        """Until no other coordinator's lease is left on any rank."""
        self._set(STANDBY, str(superseded))
        self._on_superseded()
        while any(rank.status is None or rank.status.owner not in ("", self.owner) for rank in self.ranks):
            await self.changed.wait(self._config.heartbeat)
        await asyncio.sleep(random.uniform(0, TAKEOVER_JITTER))
        if self.state == STANDBY:
            self._set(FORMING, "taking over from a coordinator whose lease has lapsed")
            get_logger().info("lease_taken", previous=superseded.owner)

    # ---- the watch

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat)
            generation = self._unfinished
            if generation is not None:
                self._check_owner(generation)
                self._check_draining(generation)
                self._check_progress(generation)
                self._probe_idle(generation)
            self.changed.ring()

    def _check_owner(self, generation: Generation) -> None:
        for rank in self.ranks:
            status = rank.status
            if status is None or status.highest_generation <= generation.number:
                continue
            by = status.owner or "another coordinator"
            generation.end(Ending("superseded", f"rank {rank.index} was fenced by {by}", rank.index))
            return

    def _check_draining(self, generation: Generation) -> None:
        """One that began to drain while the generation was formed."""
        for rank in self.ranks:
            if rank.draining:
                self._let_go(generation, rank)

    def _check_progress(self, generation: Generation) -> None:
        """A hung rank answers heartbeats. Proof of progress is an answer, or a collective within the bound."""
        waiting = generation.waiting()
        if waiting is None:
            return
        age, what, missing = waiting
        bound = self._config.probe_bound if what == "health probe" else self._config.forward_bound
        if age <= bound or not missing:
            return
        quiet = [self.ranks[i] for i in missing]
        if all(r.status is not None and r.status.since_collective_milliseconds < bound * 1e3 for r in quiet):
            return
        behind = self.behind(missing)
        reason = f"rank {', '.join(map(str, behind))} has not finished the {what} within {bound:g} s"
        generation.end(Ending("hung", reason, behind[0]))

    def _probe_idle(self, generation: Generation) -> None:
        idle = asyncio.get_running_loop().time() - generation.last_completed
        if generation.in_flight == 0 and idle >= self._config.probe_interval:
            generation.dispatch(Probe()).add_done_callback(lambda future: future.exception())
