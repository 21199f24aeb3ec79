"""What the nodes of a traced graph become while placements are propagated: tensors with a place, sizes, and calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tensor_parallel.planner.placement import Owners, Place, Unproven
from tensor_parallel.planner.program import Ref
from tensor_parallel.planner.traced import Shapes


@dataclass(eq=False)
class Value:
    """A tensor of the traced graph and where it lives."""

    ref: Ref | None
    place: Place
    shapes: Shapes  # global, at each assignment
    dtype: torch.dtype
    grad: bool  # whether a gradient may flow through it
    stored: bool = False  # a parameter held divided but gathered before every use
    weight: str | None = None  # the parameter that this is, or is a rearrangement of
    whole: Value | None = None  # this value gathered or reduced, once that has been paid for
    entered: Ref | None = None
    redo: tuple[Value, Call, int | None] | None = None  # the pending sum this one rearranges, how, and which result
    parts: list[tuple[int, Owners, Ref | None]] = field(default_factory=list)  # local parts already taken
    factors: tuple[Value, Value] | None = None  # this value is their product: a divided one, a whole scale per row

    @property
    def ndim(self) -> int:
        return len(self.shapes[0])

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shapes[0]:
            count *= size
        return count


@dataclass(eq=False)
class Sym:
    """A size or scalar computed in the graph, alike on every rank."""

    ref: Ref | None
    values: tuple[Any, ...]


class Call:
    """One traced operation with its arguments by schema name."""

    def __init__(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], shapes: Any, dtypes: Any) -> None:
        self.node = node
        target: Any = node.target
        self.op: Any = target
        self.shapes = shapes  # Shapes, or a list of them for several results
        self.dtypes = dtypes
        schema: Any = target._schema
        self.name: str = schema.name.split("::")[1]
        self.arguments = schema.arguments
        self.bound: dict[str, Any] = {}
        for position, argument in enumerate(schema.arguments):
            if argument.name in kwargs:
                self.bound[argument.name] = kwargs[argument.name]
            elif not argument.kwarg_only and position < len(args):
                self.bound[argument.name] = args[position]

    def __getitem__(self, name: str) -> Any:
        if name in self.bound:
            return self.bound[name]
        for argument in self.arguments:
            if argument.name == name:
                return argument.default_value if argument.has_default_value() else None
        raise KeyError(f"{self.op} has no argument {name}")

    def values(self) -> list[Value]:
        found: list[Value] = []
        for bound in self.bound.values():
            if isinstance(bound, Value):
                found.append(bound)
            elif isinstance(bound, (list, tuple)):
                found.extend(item for item in bound if isinstance(item, Value))
        return found

    def value(self, name: str) -> Value:
        found = self[name]
        if not isinstance(found, Value):
            raise Unproven(f"{name} is not a tensor")
        return found

    def dim(self, name: str, ndim: int) -> int:
        value = self[name]
        if not isinstance(value, int):
            raise Unproven(f"{name} is not a constant")
        return value % max(ndim, 1)

    def spread(self, replacements: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, some replaced, in the schema's order."""
        bound = {**self.bound, **replacements}
        positional = [a for a in self.arguments if not a.kwarg_only]
        last = max((i for i, a in enumerate(positional) if a.name in bound), default=-1)
        args = tuple(bound.get(a.name, a.default_value) for a in positional[: last + 1])
        return args, {a.name: bound[a.name] for a in self.arguments if a.kwarg_only and a.name in bound}


def map_values(f: Callable[[Value], Any], bound: Any) -> Any:
    """``bound``, an argument of a call, with every value in it replaced."""
    if isinstance(bound, Value):
        return f(bound)
    if isinstance(bound, (list, tuple)):
        return [f(item) if isinstance(item, Value) else item for item in bound]
    return bound
