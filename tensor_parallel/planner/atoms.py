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

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from tensor_parallel.partition import split_sizes
from tensor_parallel.planner.placement import ALL

Labels = NDArray[np.int64]


class TooFew(Exception):
    """Fewer groups of inseparable indices than ranks: these weights cannot be divided this way."""

    def __init__(self, weights: frozenset[str]) -> None:
        super().__init__(f"fewer separable parts than ranks in {', '.join(sorted(weights))}")
        self.weights = weights


class Atoms:
    def __init__(self) -> None:
        self._parent: Labels = np.empty(0, dtype=np.int64)
        self._segment: Labels = np.empty(0, dtype=np.int64)
        self._weight: Labels = np.empty(0, dtype=np.int64)
        self._shared: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)  # by root: held by every rank
        self.any_shared = False
        self._names: list[str] = []
        self._cost: list[float] = []

    def create(self, weight: str, size: int, bytes_each: float = 1.0) -> Labels:
        """New atoms for the ``size`` indices of a dimension of ``weight``; each stands for ``bytes_each`` bytes."""
        start = len(self._parent)
        fresh = np.arange(start, start + size, dtype=np.int64)
        self._parent = np.concatenate([self._parent, fresh])
        self._segment = np.concatenate([self._segment, np.zeros(size, dtype=np.int64)])
        self._weight = np.concatenate([self._weight, np.full(size, len(self._names), dtype=np.int64)])
        self._shared = np.concatenate([self._shared, np.zeros(size, dtype=np.bool_)])
        self._names.append(weight)
        self._cost.append(bytes_each)
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
        return len(np.unique(self.find(labels)))

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
        inside = np.zeros(len(self._parent), dtype=np.bool_)
        inside[np.unique(self.find(labels))] = True
        members = inside[self.find(np.arange(len(self._parent), dtype=np.int64))]
        weights = np.unique(self._weight[members])
        total = np.bincount(self._weight, minlength=len(self._names))
        mine = np.bincount(self._weight[members], minlength=len(self._names))
        if (mine[weights] > limit * total[weights]).any():
            return False
        self._shared[np.flatnonzero(members)] = True
        self.any_shared = True
        return True

    def cut(self, piece: Labels) -> None:
        """``piece`` is used apart from the rest of its weight: deal it to ranks evenly by itself."""
        segments = self._segment[piece]
        base = int(self._segment.max(initial=0)) + 1
        _, inverse = np.unique(segments, return_inverse=True)
        self._segment[piece] = base + inverse.reshape(segments.shape)

    def weights(self, labels: Labels) -> frozenset[str]:
        return frozenset(self._names[w] for w in np.unique(self._weight[labels]))

    def deal(self, ranks: int) -> Labels:
        """The rank of every atom (``ALL`` if shared): groups of one kind are dealt evenly, in order.

        Two groups are of one kind when they join the same segments of the same weights. Raises :class:`TooFew`.
        """
        everything = np.arange(len(self._parent), dtype=np.int64)
        roots = self.find(everything)
        order = np.argsort(roots, kind="stable")
        starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
        members = np.split(order, starts[1:]) if len(order) else []
        kinds: dict[frozenset[int], list[Labels]] = defaultdict(list)
        rank_of = np.zeros(len(everything), dtype=np.int64)
        for group in members:
            if self._shared[roots[group[0]]]:
                rank_of[group] = ALL
                continue
            kinds[frozenset((self._segment[group] * len(self._names) + self._weight[group]).tolist())].append(group)
        pools: dict[frozenset[int], list[Labels]] = defaultdict(list)
        for kind, groups in kinds.items():
            # A kind too small to deal by itself joins the others of its weights.
            key = kind if len(groups) >= ranks else frozenset(-1 - (k % len(self._names)) for k in kind)
            pools[key].extend(groups)
        for groups in pools.values():
            if len(groups) < ranks:
                raise TooFew(self.weights(np.concatenate(groups)))
            groups.sort(key=lambda group: int(group[0]))
            at = 0
            for rank, size in enumerate(split_sizes(len(groups), ranks)):
                rank_of[np.concatenate(groups[at : at + size])] = rank
                at += size
        return rank_of
