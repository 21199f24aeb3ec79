"""How a planned program is called: its arguments' and results' trees, and what was taken for granted of the inputs.

Plain data, unlike the trace that it comes from: a program and its signature can be handed to another process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor
from torch.utils import _pytree as pytree

from tensor_parallel.planner.branches import Branches
from tensor_parallel.planner.plan import FREE


@dataclass
class Signature:
    """``sizes`` has, for each flat input, its dimensions as numbers or expressions of free sizes, and None for what is
    no tensor. ``guards`` is what the trace assumed of the free sizes (a length divisible by a chunk size), ``branches``
    of the inputs' values, and ``assignments`` are values of the free sizes that meet the guards, the example's first.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: list[Any]
    sizes: list[tuple[Any, ...] | None]
    constants: dict[str, Tensor]
    assignments: tuple[dict[sympy.Symbol, int], ...]
    guards: tuple[Any, ...] = ()
    branches: Branches | None = None

    def shapes(self) -> list[tuple[int, ...] | None]:
        """Of the flat inputs: -1 where free; None for what is no tensor."""
        return [
            None if sizes is None else tuple(size if isinstance(size, int) else FREE for size in sizes)
            for sizes in self.sizes
        ]

    def admits(self, leaves: Sequence[Any]) -> bool:
        """Whether inputs of these sizes meet everything the trace assumed of its free sizes."""
        found: dict[sympy.Symbol, int] = {}
        for sizes, leaf in zip(self.sizes, leaves, strict=True):
            if sizes is None:
                continue
            for size, actual in zip(sizes, leaf.shape, strict=True):
                if isinstance(size, int):
                    continue  # looked at by its caller
                if size.is_Symbol:
                    if found.setdefault(size, actual) != actual:
                        return False
                elif size.subs(found) != actual:
                    return False
        return self.satisfied(found)

    def satisfied(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Whether these free sizes meet what the trace assumed of them."""
        return satisfies(self.guards, sizes)


def satisfies(guards: Sequence[Any], sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Guards over other symbols than the inputs' sizes are not ours to check."""
    return not any(guard.free_symbols <= sizes.keys() and guard.subs(sizes) == sympy.false for guard in guards)
