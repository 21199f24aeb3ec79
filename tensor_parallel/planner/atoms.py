"""Which indices must live together: a union-find over *atoms*.

Each index along the divided dimension of a weight is an atom. Rules join atoms that an operation needs on one rank:
the features of
one attention head, a gate and the value it multiplies, a query head and its key head, the input feature that consumes
an output
feature. What remains separate after the whole graph may be dealt to ranks freely. Head counts, fused layouts in any
interleaving,
grouped queries and tied weights all come out of this one relation.
"""

from __future__ import annotations

import operator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tensor_parallel.partition import split_sizes
from tensor_parallel.planner.placement import ALL
from tensor_parallel.planner.tensors import role

Labels = NDArray[np.int64]


class TooFew(Exception):
    """Fewer groups of inseparable indices than ranks: these weights cannot be divided this way."""

    def __init__(self, weights: frozenset[str]) -> None:
        super().__init__(f"fewer separable parts than ranks in {', '.join(sorted(weights))}")
        self.weights = weights


class Atoms:
    def __init__(self) -> None:
        self._size = self._segments = 0
        self._parent: Labels = np.empty(0, dtype=np.int64)  # with room to grow, as the next three
        self._segment: Labels = np.empty(0, dtype=np.int64)
        self._weight: Labels = np.empty(0, dtype=np.int64)
        self._shared: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)  # by root: held by every rank
        self.any_shared = False
        self._names: list[str] = []

    def create(self, weight: str, size: int) -> Labels:
        """New atoms for the ``size`` indices of a dimension of ``weight``."""
        start, self._size = self._size, self._size + size
        if self._size > len(self._parent):
            room = np.empty(max(self._size, 2 * len(self._parent)), dtype=np.int64)
            self._parent, self._segment, self._weight = (
                np.concatenate([old[:start], room[start:]]) for old in (self._parent, self._segment, self._weight)
            )
            self._shared = np.concatenate([self._shared[:start], np.zeros(len(room) - start, dtype=np.bool_)])
        fresh = np.arange(start, self._size, dtype=np.int64)
        self._parent[start : self._size] = fresh
        self._segment[start : self._size] = 0
        self._weight[start : self._size] = len(self._names)
        self._names.append(weight)
        return fresh

    def find(self, labels: Labels) -> Labels:
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                break
            roots = above
        self._parent[labels] = roots
        return roots

    def groups(self, labels: Labels) -> int:
        return distinct(self.find(labels))

    def union(self, a: Labels, b: Labels) -> None:
        """Join ``a[i]`` with ``b[i]`` for every i."""
        while True:
            roots_a, roots_b = self.find(a), self.find(b)
            apart = roots_a != roots_b
            if not apart.any():
                return
            low = np.minimum(roots_a[apart], roots_b[apart])
            high = np.maximum(roots_a[apart], roots_b[apart])
            np.minimum.at(self._parent, high, low)
            if self.any_shared:
                self._shared[self.find(high)] |= self._shared[high]

    def is_shared(self, labels: Labels) -> NDArray[np.bool_]:
        return self._shared[self.find(labels)]

    def share(self, labels: Labels, limit: float) -> bool:
        """Let every rank hold these indices and those joined to them, if they are at most ``limit`` of each weight."""
        inside = np.zeros(self._size, dtype=np.bool_)
        inside[self.find(labels)] = True
        members = inside[self.find(np.arange(self._size, dtype=np.int64))]
        weight = self._weight[: self._size]
        total = np.bincount(weight, minlength=len(self._names))
        mine = np.bincount(weight[members], minlength=len(self._names))
        if (mine > limit * total).any():
            return False
        self._shared[np.flatnonzero(members)] = True
        self.any_shared = True
        return True

    def cut(self, piece: Labels) -> None:
        """``piece`` is used apart from the rest of its weight: deal it to ranks evenly by itself."""
        segments = self._segment[piece]
        _, inverse = np.unique(segments, return_inverse=True)
        self._segment[piece] = self._segments + 1 + inverse.reshape(segments.shape)
        self._segments += 1 + int(inverse.max(initial=-1))

    def weights(self, labels: Labels) -> frozenset[str]:
        return frozenset(self._names[w] for w in np.unique(self._weight[labels]))

    def deal(self, ranks: int) -> Labels:
        """The rank of every atom (``ALL`` if shared): groups of one kind are dealt evenly, in order.

        Two groups are of one kind when they join the same segments of the same weights. Raises :class:`TooFew`.
        """
        roots = self.find(np.arange(self._size, dtype=np.int64))
        group = np.cumsum(roots == np.arange(self._size)) - 1  # groups by their lowest member, which is the root
        group = group[roots]
        count = distinct(roots)
        segments = self._segment[: self._size] * len(self._names) + self._weight[: self._size]
        kinds = _sets(group, segments, count)
        # A kind too small to deal by itself joins the others of its weights.
        by_weight = _sets(group, self._weight[: self._size], count)
        shared = self._shared[: self._size][np.unique(roots)]
        few = np.bincount(kinds, weights=~shared)[kinds] < ranks
        pools = np.where(shared, -1, np.where(few, count + by_weight, kinds))
        rank_of_group = np.full(count, ALL, dtype=np.int64)
        too_few: list[tuple[int, frozenset[str]]] = []
        for pool in np.unique(pools[~shared]):
            members = np.flatnonzero(pools == pool)
            if len(members) < ranks:
                too_few.append((int(members[0]), self.weights(np.flatnonzero(np.isin(group, members)))))
            rank_of_group[members] = np.repeat(np.arange(ranks), split_sizes(len(members), ranks))
        if too_few:
            # The first, and what is alike in other layers: giving those up one by one would take a solution each.
            first = {role(name) for name in min(too_few, key=operator.itemgetter(0))[1]}
            alike = [weights for _, weights in too_few if {role(name) for name in weights} == first]
            raise TooFew(frozenset().union(*alike))
        rank_of: Labels = rank_of_group[group]
        return rank_of


def distinct(labels: Labels) -> int:
    """How many different labels there are."""
    flat = np.sort(labels, axis=None)
    return int(np.count_nonzero(flat[1:] != flat[:-1])) + bool(len(flat))


def _sets(group: Labels, item: Labels, count: int) -> Labels:
    """A number for each of ``count`` groups, equal for groups whose members' items are the same set."""
    width = int(item.max(initial=0)) + 1
    pairs = np.unique(group * width + item)
    starts = np.searchsorted(pairs, np.arange(count + 1) * width)
    items = pairs % width
    numbers: dict[bytes, int] = {}
    return np.array(
        [numbers.setdefault(items[a:b].tobytes(), len(numbers)) for a, b in pairwise(starts.tolist())], dtype=np.int64
    )
