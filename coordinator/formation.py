"""How the ranks become one generation: Status of all, g = max + 1, Fence all, Join all, Probe.

Weights are not touched. A model takes part if every rank holds it with digests that agree; what a rank lacks is loaded
afterwards, beside the generation, so that one model's trouble keeps no other from serving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from coordinator.catalog import Catalog, ModelVersion, disagreement, held
from coordinator.channels import CommandChannel, StreamChannel
from coordinator.commands import Probe
from coordinator.config import Config
from coordinator.errors import ServiceError
from coordinator.generation import Generation
from coordinator.local_channel import OPEN_SECONDS, LocalChannel, LocalMemory, host_id
from coordinator.logging import get_logger
from coordinator.rank import Rank, calling
from protos.tensor_parallel.v1 import shard_pb2 as pb

T = TypeVar("T")


class FormationFailed(Exception):
    """This attempt failed; the message says which rank and why."""


class Superseded(Exception):
    """Another coordinator owns the ranks."""

    def __init__(self, owner: str, lease: float) -> None:
        super().__init__(f"another coordinator ({owner}) owns the ranks")
        self.owner = owner
        self.lease = lease


@dataclass(frozen=True, slots=True)
class Formation:
    """One attempt. ``owner`` is this coordinator's identity, ``reason`` what made the attempt necessary.

    The generation is numbered above ``last``, this coordinator's last one, and above every one that a rank has seen: if
    all ranks were replaced at once, none of them remembers any.
    """

    ranks: Sequence[Rank]
    config: Config
    owner: str
    reason: str
    last: int

    @property
    def lease(self) -> pb.Lease:
        return pb.Lease(owner=self.owner, duration_milliseconds=round(self.config.lease * 1e3))

    async def run(self, catalog: Catalog, on_status: Callable[[list[pb.StatusResponse]], None]) -> Generation:
        """Returns a generation whose first collective has run. Raises FormationFailed or Superseded."""
        statuses = await self._all(lambda rank: rank.ask_status(self.lease), "Status")
        self._check(statuses)
        on_status(statuses)
        models = [entry for entry in catalog.current.values() if self._takes_part(entry, statuses)]
        seen = [max(status.highest_generation, status.generation) for status in statuses]
        number = await self._fence(1 + max(self.last, *seen))
        await self._join(number, statuses, models)
        generation = Generation(number, len(self.ranks), self._heard)
        try:
            await self._open(statuses, generation)
            await asyncio.wait_for(generation.dispatch(Probe()), self.config.join_timeout)
        except (ServiceError, TimeoutError) as error:
            generation.close()
            raise FormationFailed(f"the first collective of generation {number} failed: {error}") from None
        except BaseException:
            generation.close()
            raise
        for entry in models:  # a Join makes what it names executable
            entry.live_in = number
        return generation

    def _heard(self, rank: int) -> None:
        self.ranks[rank].heard(asyncio.get_running_loop().time())

    def _check(self, statuses: list[pb.StatusResponse]) -> None:
        for rank, status in zip(self.ranks, statuses, strict=True):
            if (status.rank, status.world_size) != (rank.index, len(self.ranks)):
                raise FormationFailed(
                    f"the daemon at {rank.address} is rank {status.rank} of {status.world_size}, "
                    f"but was given as rank {rank.index} of {len(self.ranks)}"
                )
            if status.draining:
                raise FormationFailed(f"rank {rank.index} is draining")
            if status.owner not in ("", self.owner):
                raise Superseded(status.owner, status.lease_milliseconds / 1e3)

    def _takes_part(self, entry: ModelVersion, statuses: list[pb.StatusResponse]) -> bool:
        loaded = [held(status, entry.name, entry.version) for status in statuses]
        complete = [model for model in loaded if model is not None]
        if len(complete) != len(self.ranks):
            return False
        entry.failure = disagreement(enumerate(complete), entry.digests)
        if not entry.failure:
            entry.adopt(complete, self.config)
        return not entry.failure

    async def _fence(self, number: int) -> int:
        """Rank 0 decides between coordinators that try at once: whoever it refuses fences nobody else."""
        request = pb.FenceRequest(generation=number, lease=self.lease, reason=self.reason)
        first, *others = self.ranks

        async def fence(rank: Rank) -> None:
            answer = await rank.stub.Fence(request, timeout=self.config.join_timeout, metadata=rank.metadata)
            if not answer.accepted and answer.owner not in ("", self.owner):
                raise Superseded(answer.owner, answer.lease_milliseconds / 1e3)
            if not answer.accepted:
                raise FormationFailed(
                    f"rank {rank.index} refused generation {number}: it has seen {answer.highest_generation}"
                )

        await self._each((first,), fence, "Fence")
        await self._each(others, fence, "Fence")
        get_logger().info("fence", generation=number, reason=self.reason)
        return number

    async def _join(self, number: int, statuses: list[pb.StatusResponse], models: list[ModelVersion]) -> None:
        host_ids = [status.host_id for status in statuses]

        async def join(rank: Rank) -> str:
            request = pb.JoinRequest(
                generation=number,
                owner=self.owner,
                store_address=statuses[0].store_address,
                timeout_milliseconds=round(self.config.join_timeout * 1e3),
                models=[_join_model(entry, rank.index) for entry in models],
                host_ids=host_ids,
            )
            answer = await rank.stub.Join(request, timeout=self.config.join_timeout + 1, metadata=rank.metadata)
            return str(answer.backend)

        backends = await self._all(join, "Join")
        if len(set(backends)) > 1:
            raise FormationFailed(f"the ranks formed different groups: {', '.join(backends)}")
        get_logger().info("join", generation=number, backend=backends[0])

    async def _open(self, statuses: list[pb.StatusResponse], generation: Generation) -> None:
        """The ordered channels: through shared memory to ranks of this host, as a stream to others."""
        here = host_id() if self.config.local_channel else None
        near = [status.host_id == here for status in statuses]
        reclaim = all(status.device == "cpu" for status in statuses)
        memory = LocalMemory(len(self.ranks), reclaim=reclaim) if any(near) else None
        opened: list[CommandChannel] = []
        generation.attach(opened, memory)  # whatever was opened is closed with the generation
        for rank, local in zip(self.ranks, near, strict=True):
            channel = await self._open_local(rank, generation, memory) if local and memory is not None else None
            opened.append(channel or self._stream(rank, generation))

    def _stream(self, rank: Rank, generation: Generation) -> CommandChannel:
        return StreamChannel(rank.index, generation.number, self.owner, rank.channel, generation, rank.metadata)

    async def _open_local(self, rank: Rank, generation: Generation, memory: LocalMemory) -> CommandChannel | None:
        """None where it cannot be had, which costs speed and nothing else."""
        request = pb.OpenLocalChannelRequest(generation=generation.number, owner=self.owner)
        channel = LocalChannel(rank.index, generation.number, memory, generation)
        try:
            with calling():
                door = await rank.stub.OpenLocalChannel(request, timeout=OPEN_SECONDS, metadata=rank.metadata)
            await channel.open(door.socket_path, door.token)
            return channel
        except (grpc.RpcError, OSError, TimeoutError) as error:
            reason = error.details() if isinstance(error, grpc.RpcError) else str(error) or type(error).__name__
            get_logger().warning("local_channel_refused", rank=rank.index, reason=reason)
            return None

    async def _all(self, call: Callable[[Rank], Awaitable[T]], what: str) -> list[T]:
        return await self._each(self.ranks, call, what)

    async def _each(self, ranks: Sequence[Rank], call: Callable[[Rank], Awaitable[T]], what: str) -> list[T]:
        """``call`` on all ``ranks`` at once; the first failure cancels the others."""

        async def one(rank: Rank) -> T:
            try:
                with calling():
                    return await call(rank)
            except grpc.RpcError as error:
                detail = error.details() or error.code().name
                raise FormationFailed(f"rank {rank.index} failed in {what}: {detail}") from None

        return await gather([one(rank) for rank in ranks])


async def gather(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """asyncio.gather whose first failure cancels the rest, and is raised as it is (a TaskGroup would wrap it)."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _join_model(entry: ModelVersion, rank: int) -> pb.JoinModel:
    digests = entry.digests
    assert digests is not None
    return pb.JoinModel(
        name=entry.name,
        version=entry.version,
        source_digest=digests.source,
        plan_digest=digests.plan,
        shard_digest=digests.shard(rank),
    )
