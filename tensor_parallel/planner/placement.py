"""Where a value lives: replicated, a pending sum, or divided along one dimension.

Sizes of free dimensions (batch, sequence) are not known when a plan is made, so every statement about a value is made,
and proven,
at several *assignments* of concrete sizes to them at once. ``Sharded.owners[k]`` says for assignment ``k`` which rank
owns each
index of the dimension. A rank holds its indices in ascending global order; that invariant is what makes an owner per
index
sufficient, and every rule has to prove it for its result.

An index may also be *shared*: held by every rank (the one key head of multi-query attention, in a fused projection
whose query heads are divided). Its owner is then ``ALL``. Gradients of shared indices are kept as each rank's equal
part of the whole gradient, so that summing over ranks is right for them too (``runtime.Leave``, ``runtime.Shared``).

While a plan is being solved, the "rank" of an index is an *atom* (see ``atoms``): who owns it is what is being decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ALL = -1
Owners = tuple[NDArray[np.int64], ...]
"""Per assignment, the owner of each index along a dimension."""


class Unproven(Exception):
    """This rule cannot show that its operation may run on local parts; the operand is gathered instead."""


@dataclass(frozen=True, eq=False)
class Replicated:
    """Every rank holds the whole value."""


@dataclass(frozen=True, eq=False)
class Partial:
    """The value is the sum of what the ranks hold. ``origin``: as for :class:`Sharded`, where it can be changed."""

    origin: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Sharded:
    """Each rank holds, in ascending order, the indices along ``dim`` that it owns.

    ``origin`` names the weights whose division produced this one: what the search may change when it proves costly.
    """

    dim: int
    owners: Owners
    origin: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Undecided:
    """A parameter, or a view of one, whose division no use has settled yet (only while solving).

    ``dims[i]`` is the parameter's dimension that dimension ``i`` of this view runs along in full, or None.
    """

    param: str
    dims: tuple[int | None, ...]
    looked_up: bool = False  # rows selected by index (an embedding): the table may still be divided by rows


Place = Replicated | Partial | Sharded | Undecided
REPLICATED, PARTIAL = Replicated(), Partial()


def same(a: Owners, b: Owners) -> bool:
    return all(x is y or (x.shape == y.shape and bool((x == y).all())) for x, y in zip(a, b, strict=True))


def positions(owner: NDArray[np.int64], rank: int) -> NDArray[np.int64]:
    """Global indices that ``rank`` holds."""
    return np.flatnonzero((owner == rank) | (owner == ALL))


def counts(owner: NDArray[np.int64], ranks: int) -> tuple[int, ...]:
    """How many indices each rank holds."""
    shared = int((owner == ALL).sum())
    return tuple(int(c) + shared for c in np.bincount(owner[owner != ALL], minlength=ranks)[:ranks])


def is_mixed(owners: Owners) -> bool:
    """Whether some indices are shared."""
    return any(bool((owner == ALL).any()) for owner in owners)


def is_contiguous(owner: NDArray[np.int64]) -> bool:
    """Whether rank 0's indices come first, then rank 1's, ..., so that concatenating the parts restores the whole."""
    return bool((np.diff(owner) >= 0).all())


@dataclass(frozen=True)
class Pattern:
    """A dimension whose size may be free, as ``outer x base x inner``: ``base`` is fixed and carries the owners.

    ``outer`` repeats the base (batch times heads, flattened), ``inner`` repeats each of its entries (heads times
    length). At most
    one of the two is free, written as -1; both are 1 when the dimension is fixed.
    """

    base: NDArray[np.int64]
    outer: int = 1
    inner: int = 1


def pattern(owners: Owners) -> Pattern | None:
    """The pattern all assignments share, or None: then the division cannot be written down for every size."""
    first = owners[0]
    if all(o is first or (o.shape == first.shape and bool((o == first).all())) for o in owners):
        return Pattern(first)
    size = int(np.gcd.reduce([len(o) for o in owners]))
    for length in sorted(_divisors(size)):
        base = first[:length]
        if all(bool((o.reshape(-1, length) == base).all()) for o in owners):
            return Pattern(base, outer=-1)
        stretched = first.reshape(length, -1)[:, 0]
        if all(bool((o.reshape(length, -1) == stretched[:, None]).all()) for o in owners):
            return Pattern(stretched, inner=-1)
    return None


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
