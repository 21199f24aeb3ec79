"""One load on some ranks at once: their progress merged, their results collected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import grpc

from coordinator.catalog import Digests, ModelVersion
from coordinator.errors import ServiceError, Unavailable, from_rpc
from coordinator.formation import gather
from coordinator.generation import RETRY_MS
from coordinator.logging import get_logger
from coordinator.plans import with_plan
from coordinator.rank import Rank, calling
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import shard_pb2

CANCEL_TIMEOUT = 5.0
LONGEST = 24 * 3600.0  # no load takes longer; progress within `stall` seconds is what is asked for


@dataclass(slots=True)
class RankLoads:
    """``on_progress`` is called with every change; ``stall`` is how many seconds a rank may say nothing. ``plan`` is a
    survivor's, if there is one."""

    ranks: Sequence[Rank]
    entry: ModelVersion
    expected: Digests | None
    lease: shard_pb2.Lease
    stall: float
    on_progress: Callable[[], None]
    plan: bytes = b""
    progress: dict[int, pb.RankProgress] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _started: dict[int, tuple[float, int]] = field(default_factory=dict)

    async def run(self) -> dict[int, shard_pb2.LoadedModel]:
        """By rank. The first failure cancels the load on the others, and is raised as a ServiceError."""
        try:
            loaded = await gather([self._load(rank) for rank in self.ranks])
        except BaseException:
            await asyncio.shield(forget(self.ranks, self.entry.name, self.entry.version))
            raise
        return {rank.index: model for rank, model in zip(self.ranks, loaded, strict=True)}

    async def _load(self, rank: Rank) -> shard_pb2.LoadedModel:
        call = rank.stub.Load(with_plan(self._request(rank), self.plan), timeout=LONGEST, metadata=rank.metadata)
        try:
            while True:
                with calling():
                    message = await asyncio.wait_for(call.read(), self.stall)
                if message is grpc.aio.EOF:
                    raise Unavailable(f"rank {rank.index} ended its load without a result", retry_after_ms=RETRY_MS)
                self._note(rank, message)
                if message.HasField("model"):
                    return shard_pb2.LoadedModel.FromString(message.model.SerializeToString())
        except TimeoutError:
            raise Unavailable(f"rank {rank.index} made no progress for {self.stall:g} s") from None
        except grpc.RpcError as error:
            raise load_error(rank, error) from None
        finally:
            call.cancel()

    def _request(self, rank: Rank) -> shard_pb2.ShardLoadRequest:
        request = shard_pb2.ShardLoadRequest(
            name=self.entry.name,
            version=self.entry.version,
            path=self.entry.path,
            options=self.entry.options,
            lease=self.lease,
        )
        if self.expected is not None:
            request.expected_source_digest = self.expected.source
            request.expected_plan_digest = self.expected.plan
            request.expected_shard_digest = self.expected.shard(rank.index)
        return request

    def _note(self, rank: Rank, message: shard_pb2.ShardLoadProgress) -> None:
        now = asyncio.get_running_loop().time()
        self.warnings += [warning for warning in message.warnings if warning not in self.warnings]
        done, total = message.bytes_done, message.bytes_total
        since, first = self._started.setdefault(rank.index, (now, done)) if done else (now, done)
        speed = (done - first) / (now - since) if now > since else 0.0
        self.progress[rank.index] = pb.RankProgress(
            rank=rank.index,
            bytes_done=done,
            bytes_total=total,
            bytes_per_second=speed,
            eta_seconds=(total - done) / speed if speed > 0 and total > done else 0.0,
            stage=message.stage,
        )
        self.on_progress()


async def forget(ranks: Iterable[Rank], name: str, version: str) -> None:
    """Cancels the load of a version that is not active, and frees what ``ranks`` hold of it, if anything."""
    request = shard_pb2.CancelLoadRequest(name=name, version=version)

    async def one(rank: Rank) -> None:
        try:
            with calling():
                await rank.stub.CancelLoad(request, timeout=CANCEL_TIMEOUT, metadata=rank.metadata)
        except grpc.RpcError as error:  # it is gone, or will be asked again in the next generation
            get_logger().info("forget_failed", rank=rank.index, model=f"{name}@{version}", error=error.details())

    await asyncio.gather(*(one(rank) for rank in ranks if rank.alive))


def load_error(rank: Rank, error: grpc.RpcError) -> ServiceError:
    """What ``rank`` said to a Load, as the client may see it."""
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Unavailable(f"rank {rank.index} was lost while loading: {error.details()}", retry_after_ms=RETRY_MS)
    return from_rpc(error, f"rank {rank.index}: ")
