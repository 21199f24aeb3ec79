"""Plans that are known already: a peer's, for a rank that takes a lost one's place, and that of a loaded model of the
same architecture, such as the version that a new one follows.

Tracing and planning take seconds, and are the same whatever the weights are.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

from torch import Tensor, nn

from tensor_parallel.checkpoint.digest import content_digest
from tensor_parallel.checkpoint.source import Source
from tensor_parallel.errors import NotPortable
from tensor_parallel.planner.plan import Plan
from tensor_parallel.planner.tensors import Tensors
from tensor_parallel.serving_options import ServingOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """``plans``, of which the first is the one that a load goes by; none if it has to make one. ``planned_by`` says who
    has. ``architecture`` names all that decides the plan, and is empty where that cannot be told."""

    plans: Sequence[Plan]
    planned_by: str
    architecture: str


class Keeper(Protocol):
    """A model that was planned."""

    @property
    def architecture(self) -> str: ...
    @property
    def plans(self) -> Sequence[Plan]: ...


_keepers: WeakSet[Keeper] = WeakSet()


def keep(keeper: Keeper) -> None:
    """Later loads of the same architecture may take the plans of ``keeper``, while it lives."""
    if keeper.architecture:
        _keepers.add(keeper)


def find(source: Source, model: nn.Module, world_size: int, options: ServingOptions) -> Known:
    """What is known of how to plan ``model``, which is what ``source`` describes."""
    architecture = _architecture(source, model, world_size)
    plans = _of_a_peer(model, world_size, options)
    if plans:
        return Known(plans, "a peer", architecture)
    plans = _of_a_loaded_model(architecture, options)
    if plans:
        return Known(plans, "an earlier load", architecture)
    return Known((), "this rank", architecture)


def _of_a_peer(model: nn.Module, world_size: int, options: ServingOptions) -> Sequence[Plan]:
    if not options.plan:
        return ()
    from tensor_parallel.planner.portable import unpack_for

    try:
        return unpack_for(options.plan, model, world_size, options.known_plan)
    except NotPortable as error:
        log.warning("the plan of a peer cannot be used: %s", error)
    except Exception:  # it only saves time: whatever is wrong with it must not keep the rank from its place
        log.exception("the plan of a peer cannot be used")
    return ()


def _of_a_loaded_model(architecture: str, options: ServingOptions) -> Sequence[Plan]:
    for keeper in list(_keepers):
        if not architecture or keeper.architecture != architecture:
            continue
        plans = keeper.plans
        verified = plans[0].verified != "no" or not options.verify
        if options.known_plan in ("", plans[0].digest()) and verified:
            return plans
    return ()


def _architecture(source: Source, model: nn.Module, world_size: int) -> str:
    """Digest of what the source says of the model, of its tensors' names and types, of all values but the parameters',
    some of which a plan is made of, and of the inputs that it is traced with; empty where the source cannot say."""
    described = source.architecture()
    if described is None:
        return ""
    tensors = Tensors(model)
    buffers = {name: _content(value) for name, value in model.named_buffers()}
    constants = {
        f"{prefix}.{name}": _content(value)
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    inputs = {name: _content(value) for name, value in source.example_inputs().items()}
    document = [world_size, described, repr(tensors.stored), tensors.tied, buffers, constants, inputs]
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _content(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)} {'' if value.is_meta else content_digest(value)}"
