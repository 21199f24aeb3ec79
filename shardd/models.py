"""The models that this daemon holds, by (name, version), and the state of each: LOADING, LOADED or ACTIVE.

Weights stay through every generation until they are unloaded. Only an ACTIVE version can be executed: it becomes so by
an Activate command, in order with everything else, or by being named in a Join.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from protos.tensor_parallel.v1 import shard_pb2
from shardd.errors import InvalidRequest, UnknownModel, WrongState

if TYPE_CHECKING:
    import torch

    from shardd.metrics import ModelMetrics

Key = tuple[str, str]


class State(StrEnum):
    LOADING = "LOADING"
    LOADED = "LOADED"
    ACTIVE = "ACTIVE"


class Served(Protocol):
    """What the executor needs of a loaded model: ``tensor_parallel.serving.ServedModel`` has it."""

    @property
    def bytes_held(self) -> int: ...
    @property
    def planned_by(self) -> str: ...

    def checksum(self) -> int: ...
    def export_plan(self) -> bytes: ...
    def validate(self, inputs: Mapping[str, torch.Tensor]) -> Any: ...
    def run(self, inputs: Mapping[str, torch.Tensor], form: Any = None) -> dict[str, torch.Tensor]: ...


@dataclass
class Model:
    """One loaded version.

    ``outputs`` maps every output's name to whether this rank sends its (part of) it. It is empty for a model whose
    outputs show only when it runs: they are whole on every rank then, and the ``first`` rank sends them. Such a model's
    own code runs, and may write to its inputs (``writes_inputs``), which other ranks may be reading.
    ``checksum`` is of the weights on a device whose kernels may be aborted; None on the CPU.
    """

    name: str
    version: str
    fingerprint: bytes
    served: Served
    outputs: Mapping[str, bool]
    description: shard_pb2.LoadedModel
    metrics: ModelMetrics
    first: bool
    writes_inputs: bool
    checksum: int | None
    state: State = State.LOADED

    def check_wanted(self, wanted: Sequence[str]) -> None:
        """Raise :class:`InvalidRequest` if the model is known not to have an output that the caller wants."""
        if wanted and self.outputs:
            self._check(wanted, self.outputs)

    def sent(self, wanted: Sequence[str], made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Which of the outputs just ``made`` this rank sends when the caller wants ``wanted`` (none: all of them)."""
        if wanted and not self.outputs:
            self._check(wanted, made)
        return {name: made[name] for name in wanted or made if name in made and self.outputs.get(name, self.first)}

    def _check(self, wanted: Sequence[str], known: Collection[str]) -> None:
        if unknown := [name for name in wanted if name not in known]:
            raise InvalidRequest(
                f"model {self.name!r} has no output {', '.join(map(repr, unknown))}; "
                f"its outputs are {', '.join(map(repr, known))}"
            )

    def intact(self) -> bool:
        """Whether the weights still are what was loaded."""
        return self.checksum is None or self.served.checksum() == self.checksum

    def describe(self) -> shard_pb2.LoadedModel:
        message = shard_pb2.LoadedModel()
        message.CopyFrom(self.description)
        message.state = self.state.value
        return message


class Models:
    """The registry. Safe from any thread; no call waits. ``forgotten(name)``: the last version of a name has gone."""

    def __init__(self, forgotten: Callable[[str], None] = lambda name: None) -> None:
        self._forgotten = forgotten
        self._lock = threading.Lock()
        self._models: dict[Key, Model] = {}
        self._loading: set[Key] = set()
        self.loads = 0

    def active(self, name: str, version: str) -> Model:
        """The version to execute. Raises :class:`UnknownModel` or :class:`WrongState`."""
        model = self.loaded(name, version)
        if model.state is not State.ACTIVE:
            raise WrongState(f"model {name!r} version {version!r} is loaded but not active")
        return model

    def loaded(self, name: str, version: str) -> Model:
        """The version, active or not. Raises :class:`UnknownModel`, or :class:`WrongState` while it is being loaded."""
        model = self._models.get((name, version))
        if model is None:
            raise self._absent(name, version)
        return model

    def get(self, name: str, version: str) -> Model | None:
        with self._lock:
            return self._models.get((name, version))

    def begin_load(self, name: str, version: str) -> None:
        """Show the version as LOADING."""
        with self._lock:
            self._loading.add((name, version))

    def end_load(self, name: str, version: str, model: Model | None, *, loading: bool) -> None:
        """A load has ended: with ``model``, or without. ``loading``: another one of the same version goes on."""
        with self._lock:
            if not loading:
                self._loading.discard((name, version))
            if model is not None:
                self._models[name, version] = model
                self.loads += 1

    def activate(self, name: str, version: str) -> None:
        """Make a loaded version executable; other versions of the name stay as they are."""
        with self._lock:
            self.loaded(name, version).state = State.ACTIVE

    def unload(self, name: str, version: str) -> None:
        """Forget a version, or with an empty ``version`` all of the name's; its memory is freed by the last user."""
        with self._lock:
            gone = [key for key in self._models if key[0] == name and version in ("", key[1])]
            if not gone:
                raise self._absent(name, version)
            for key in gone:
                del self._models[key]
            self._forget(name)

    def discard(self, name: str, version: str) -> bool:
        """Forget a version that was never active: its load failed on another rank. Returns whether there was one."""
        with self._lock:
            model = self._models.get((name, version))
            if model is None or model.state is State.ACTIVE:
                return False
            del self._models[name, version]
            self._forget(name)
        return True

    def join(self, wanted: Iterable[shard_pb2.JoinModel]) -> None:
        """Make exactly ``wanted`` executable. Raises :class:`WrongState` naming the first that is absent or differs."""
        with self._lock:
            active = [self._agreeing(model) for model in wanted]
            for model in self._models.values():
                model.state = State.LOADED
            for model in active:
                model.state = State.ACTIVE

    def _agreeing(self, wanted: shard_pb2.JoinModel) -> Model:
        model = self._models.get((wanted.name, wanted.version))
        if model is None:
            raise WrongState(f"model {wanted.name!r} version {wanted.version!r} is not loaded here")
        check_digests(model.description, wanted.source_digest, wanted.plan_digest, wanted.shard_digest, wanted.name)
        return model

    def describe(self) -> list[shard_pb2.LoadedModel]:
        """Every version, those being loaded included, for the status."""
        with self._lock:
            held = [model.describe() for model in self._models.values()]
            coming = [key for key in self._loading if key not in self._models]
        for name, version in coming:
            held.append(shard_pb2.LoadedModel(name=name, version=version, state=State.LOADING.value))
        return held

    def bytes_held(self) -> int:
        with self._lock:
            return sum(model.served.bytes_held for model in self._models.values())

    def intact(self) -> bool:
        """Whether every model's weights still are what was loaded. For the executor: it reads them all."""
        with self._lock:
            models = list(self._models.values())
        return all(model.intact() for model in models)

    def _forget(self, name: str) -> None:
        if not any(key[0] == name for key in self._models):
            self._forgotten(name)

    def _absent(self, name: str, version: str) -> UnknownModel | WrongState:
        if (name, version) in self._loading:
            return WrongState(f"model {name!r} version {version!r} is still being loaded")
        return UnknownModel(f"model {name!r} version {version!r} is not loaded")


def check_digests(held: shard_pb2.LoadedModel, source: str, plan: str, shard: str, name: str) -> None:
    """Raise :class:`WrongState`, explaining, if ``held`` differs from what its peers or its predecessor hold."""
    pairs = (
        ("the checkpoint", held.source_digest, source),
        ("the sharding plan", held.plan_digest, plan),
        ("this rank's weights", held.shard_digest, shard),
    )
    for what, have, expected in pairs:
        if expected and have != expected:
            raise WrongState(
                f"model {name!r}: {what} changed: {have} is held here, but {expected} is what the other ranks go with. "
                "Load the model again on all ranks to serve what is on disk now"
            )
