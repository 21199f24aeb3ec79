"""The models that this coordinator is to serve, and what it knows about each: identity, digests, interface, state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.config import Config
from coordinator.errors import FailedPrecondition, NotFound, Unavailable
from coordinator.types import Accepted, Form, ModelStatistics
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import shard_pb2

RETRY_MS = 250
HELD = ("LOADED", "ACTIVE")
MOST_UNLOADED = 256  # names remembered; the oldest are forgotten


@dataclass(frozen=True, slots=True)
class Digests:
    """``source`` and ``plan`` are equal on all ranks; ``shards`` is by rank (empty where not known)."""

    source: str
    plan: str
    shards: tuple[str, ...] = ()

    def shard(self, rank: int) -> str:
        return self.shards[rank] if rank < len(self.shards) else ""


@dataclass(slots=True)
class ModelVersion:
    """One version of one model. It can be executed in generation ``live_in`` and in no other."""

    name: str
    version: str
    path: str
    options: pb.LoadOptions
    digests: Digests | None = None
    info: pb.ModelInfo | None = None
    placements: list[dict[str, shard_pb2.OutputPlacement]] = field(default_factory=list)
    """By rank, by output."""
    live_in: int = 0
    failure: str = ""
    """Why it cannot be served and will not be by waiting; empty otherwise."""
    users: int = 0
    """Requests waiting or dispatched."""
    served: bool = False
    """It has served before: while it is not live it is coming back, and a retry helps."""
    joinable: bool = False
    """It has been shown that its rows do not depend on each other: requests may share a forward."""
    join_tried: bool = False
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    accepted: dict[Form, Accepted] = field(default_factory=dict)
    """Forms of requests that ``info`` is known to allow."""

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    def adopt(self, loaded: Sequence[shard_pb2.LoadedModel], config: Config) -> None:
        """Takes digests, interface and placements from what the ranks hold (all of them, by rank)."""
        self.digests = Digests(
            loaded[0].source_digest, loaded[0].plan_digest, tuple(model.shard_digest for model in loaded)
        )
        self.placements = [{placement.name: placement for placement in model.placements} for model in loaded]
        info = pb.ModelInfo()
        info.CopyFrom(loaded[0].info)
        info.name, info.version, info.path = self.name, self.version, self.path or info.path
        del info.bytes_per_rank[:]
        info.bytes_per_rank.extend(model.bytes_held for model in loaded)
        info.plan_digest = info.plan_digest or self.digests.plan
        info.weights_digest = info.weights_digest or self.digests.source
        batching = self.options.batching
        info.batching.max_joined_rows = batching.max_joined_rows or config.batch_rows
        info.batching.max_delay_microseconds = batching.max_delay_microseconds or round(config.batch_delay * 1e6)
        info.batching.max_batch_size = batching.max_batch_size
        self.info = info
        self.accepted.clear()


def held(status: shard_pb2.StatusResponse, name: str, version: str) -> shard_pb2.LoadedModel | None:
    """What the rank holds of this version, completely loaded."""
    for model in status.models:
        if model.name == name and model.version == version and model.state in HELD:
            return model
    return None


def disagreement(loaded: Iterable[tuple[int, shard_pb2.LoadedModel]], digests: Digests | None) -> str:
    """In words, where the ranks' copies differ from each other or from ``digests``; empty when they agree."""
    first: tuple[int, shard_pb2.LoadedModel] | None = None
    for rank, model in loaded:
        if first is None:
            first = (rank, model)
        if model.source_digest != first[1].source_digest:
            return f"ranks {first[0]} and {rank} loaded different checkpoints (did the files change in between?)"
        if model.plan_digest != first[1].plan_digest:
            return f"ranks {first[0]} and {rank} derived different sharding plans"
        expected = digests.shard(rank) if digests is not None and digests.plan == model.plan_digest else ""
        if digests is not None and digests.source == model.source_digest and expected not in ("", model.shard_digest):
            return f"rank {rank} holds other weights than before"
    return ""


class Catalog:
    """By name: the version that serves or should (``current``), and those that only finish what they were given."""

    def __init__(self) -> None:
        self.current: dict[str, ModelVersion] = {}
        self.loading: dict[str, ModelVersion] = {}
        self.retiring: list[ModelVersion] = []
        self.unloaded: dict[str, ModelVersion] = {}
        """What each name was when it was unloaded, so that it can be loaded again by name alone."""
        self._last_version: dict[str, int] = {}

    def note_version(self, name: str, version: str) -> None:
        if version.isdecimal():
            self._last_version[name] = max(self._last_version.get(name, 0), int(version))

    def next_version(self, name: str) -> str:
        return str(self._last_version.get(name, 0) + 1)

    def note_unloaded(self, entry: ModelVersion) -> None:
        self.unloaded.pop(entry.name, None)
        self.unloaded[entry.name] = ModelVersion(entry.name, entry.version, entry.path, entry.options)
        while len(self.unloaded) > MOST_UNLOADED:
            del self.unloaded[next(iter(self.unloaded))]

    def last(self, name: str) -> ModelVersion | None:
        """What serves under this name, or did last."""
        return self.current.get(name) or self.unloaded.get(name)

    def find(self, name: str, version: str = "") -> ModelVersion:
        """The entry, live or not. Raises NotFound, or FailedPrecondition during the very first load."""
        entry = self.current.get(name)
        if entry is not None and version in ("", entry.version):
            return entry
        loading = self.loading.get(name)
        if loading is not None and version in ("", loading.version):
            raise FailedPrecondition(f"model {loading.label} is still being loaded")
        if entry is not None:
            raise NotFound(f"model {name!r} has no version {version!r}; {entry.version!r} is being served")
        known = ", ".join(sorted(self.current)) or "none"
        raise NotFound(f"there is no model {name!r} (loaded: {known})")

    def ready(self, name: str, version: str, generation: int) -> ModelVersion:
        """The entry if a forward would work in ``generation``. Raises as ``find``, FailedPrecondition, Unavailable."""
        entry = self.find(name, version)
        if entry.live_in == generation and entry.info is not None:
            return entry
        if entry.failure:
            raise FailedPrecondition(f"model {entry.label} cannot be served: {entry.failure}")
        if entry.served:
            raise Unavailable(f"model {entry.label} is being restored", retry_after_ms=RETRY_MS)
        raise FailedPrecondition(f"model {entry.label} is not loaded yet")

    def wanted(self) -> set[tuple[str, str]]:
        """Every version that a rank may rightly hold."""
        entries = [*self.current.values(), *self.loading.values(), *self.retiring]
        return {(entry.name, entry.version) for entry in entries}
