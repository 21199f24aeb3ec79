"""The planned computation as data: one list of steps for all ranks, with the constants that differ by rank written
side by side.

From one ``Program`` come the Python function each rank runs (``build``) and the lockstep simulation of all ranks
(``simulate``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ref:
    """The result of a step, an input, a parameter or a constant, by number."""

    id: int


@dataclass(frozen=True, eq=False)
class PerRank:
    """A constant that differs by rank."""

    values: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Step:
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    source: str  # the traced operation this step comes from


@dataclass
class Program:
    ranks: int
    inputs: list[int] = field(default_factory=list)  # by position of the flat user input
    states: dict[str, int] = field(default_factory=dict)  # parameters and buffers by name
    constants: dict[str, int] = field(default_factory=dict)  # tensors the trace lifted out of the model
    steps: list[Step] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)  # flat user outputs: Ref or a plain constant
    updates: dict[str, Ref] = field(default_factory=dict)  # new values of mutated buffers
    size: int = 0

    def new_id(self) -> int:
        self.size += 1
        return self.size - 1


def map_refs(value: Any, on_ref: Callable[[Ref], Any], on_rank: Callable[[PerRank], Any]) -> Any:
    """``value`` with every reference and every per-rank constant inside it replaced."""
    if isinstance(value, Ref):
        return on_ref(value)
    if isinstance(value, PerRank):
        chosen = on_rank(value)
        return chosen if isinstance(chosen, PerRank) else map_refs(chosen, on_ref, on_rank)
    if isinstance(value, list):  # the trace's own immutable lists included
        return [map_refs(item, on_ref, on_rank) for item in value]
    if type(value) is tuple:
        return tuple(map_refs(item, on_ref, on_rank) for item in value)
    if isinstance(value, dict):
        return {key: map_refs(item, on_ref, on_rank) for key, item in value.items()}
    return value


def refs_in(step: Step) -> list[int]:
    found: list[int] = []

    def note(ref: Ref) -> Ref:
        found.append(ref.id)
        return ref

    map_refs((step.args, step.kwargs), note, lambda constant: constant.values[0])
    return found


def prune(program: Program) -> None:
    """Drop steps whose results nobody uses (collectives too: every rank drops the same ones)."""
    needed: set[int] = set()
    map_refs((program.outputs, program.updates), lambda ref: needed.add(ref.id), lambda constant: None)
    kept: list[Step] = []
    for step in reversed(program.steps):
        if step.out in needed:
            kept.append(step)
            needed.update(refs_in(step))
    program.steps = kept[::-1]
