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
        self._sizes: list[int] = []  # by weight: how many atoms it has

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
        self._sizes.append(size)
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

    def groups_joined(self, a: Labels, b: Labels) -> int:
        """How many groups there would be of these, were ``a[i]`` joined with ``b[i]`` for every i."""
        left, right = self.find(a).reshape(-1), self.find(b).reshape(-1)
        roots = _unique(np.concatenate([left, right]))
        number = np.empty(self._size, dtype=np.int64)  # by root; only theirs are written and read
        number[roots] = np.arange(len(roots))
        # Neighbours often belong to the same two groups (the features of a head): once will do.
        new = _starts((left[1:] != left[:-1]) | (right[1:] != right[:-1]), len(left))
        scratch = Atoms()
        joined = scratch.create("", len(roots))
        scratch.union(number[left[new]], number[right[new]])
        return scratch.groups(joined)

    def is_shared(self, labels: Labels) -> NDArray[np.bool_]:
        return self._shared[self.find(labels)]

    def share(self, labels: Labels, limit: float) -> bool:
        """Let every rank hold these indices and those joined to them, if they are at most ``limit`` of each weight."""
        most = limit * np.array(self._sizes)

        def too_many(atoms: Labels) -> bool:
            return bool((np.bincount(self._weight[atoms], minlength=len(most)) > most).any())

        if too_many(_unique(labels)):  # as most often: all others need not be looked at
            return False
        inside = np.zeros(self._size, dtype=np.bool_)
        inside[self.find(labels)] = True
        members = np.flatnonzero(inside[self.find(np.arange(self._size, dtype=np.int64))])
        if too_many(members):
            return False
        self._shared[members] = True
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
        every = np.arange(self._size, dtype=np.int64)
        roots = self.find(every)
        lowest = roots == every  # groups by their lowest member, which is the root
        group = (np.cumsum(lowest) - 1)[roots]
        count = int(np.count_nonzero(lowest))
        segments = self._segment[: self._size] * len(self._names) + self._weight[: self._size]
        kinds = _sets(group, segments, count)
        # A kind too small to deal by itself joins the others of its weights.
        by_weight = _sets(group, self._weight[: self._size], count)
        shared = self._shared[: self._size][lowest]
        few = np.bincount(kinds, weights=~shared)[kinds] < ranks
        pools = np.where(shared, -1, np.where(few, count + by_weight, kinds))
        rank_of_group = np.full(count, ALL, dtype=np.int64)
        too_few: list[tuple[int, frozenset[str]]] = []
        order = np.argsort(pools, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(pools[order])) + 1):
            if not len(members) or shared[members[0]]:
                continue
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
    return len(_unique(labels))


def _unique(labels: Labels) -> Labels:
    """The different labels in order. ``np.unique`` hashes or sorts from scratch; labels come in long ascending runs,
    which a stable sort merges: a hundred times faster for a large model's."""
    ordered = np.sort(labels, axis=None, kind="stable")
    return ordered[_starts(ordered[1:] != ordered[:-1], len(ordered))]


def _starts(changes: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Where runs of equal things start among ``count``, of which ``changes`` tells whether two neighbours differ."""
    return np.concatenate([np.ones(min(count, 1), dtype=np.bool_), changes])


def _sets(group: Labels, item: Labels, count: int) -> Labels:
    """A number for each of ``count`` groups, equal for groups whose members' items are the same set."""
    width = int(item.max(initial=0)) + 1
    pairs = _unique(group * width + item)
    owner, items = np.divmod(pairs, width)
    sizes = np.bincount(owner, minlength=count)
    starts = np.cumsum(sizes) - sizes
    # Most groups have the same items as the one before: a number is looked up for the others only.
    alike = np.concatenate([np.zeros(min(count, 1), dtype=np.bool_), sizes[1:] == sizes[:-1]])
    before = np.arange(len(pairs)) - sizes[owner]
    differs = alike[owner] & (items != items[before])
    changed = ~alike
    changed[owner[differs]] = True
    numbers: dict[bytes, int] = {}
    first = np.flatnonzero(changed)
    found = [
        numbers.setdefault(items[a : a + n].tobytes(), len(numbers))
        for a, n in zip(starts[first].tolist(), sizes[first].tolist(), strict=True)
    ]
    result: Labels = np.array(found, dtype=np.int64)[np.cumsum(changed) - 1]
    return result
