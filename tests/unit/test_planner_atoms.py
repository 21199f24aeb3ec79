"""Atoms against what they stand for, written out: components of a graph, dealt to ranks kind by kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tensor_parallel.partition import split_sizes
from tensor_parallel.planner.atoms import Atoms, Labels, TooFew, distinct


class Written:
    """The same relation by sets of labels."""

    def __init__(self) -> None:
        self.weight: list[int] = []
        self.groups: list[set[int]] = []

    def create(self, weight: int, size: int) -> None:
        self.groups += [{len(self.weight) + at} for at in range(size)]
        self.weight += [weight] * size

    def of(self, label: int) -> set[int]:
        return next(group for group in self.groups if label in group)

    def union(self, a: Labels, b: Labels) -> None:
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            one, other = self.of(left), self.of(right)
            if one is not other:
                one |= other
                self.groups.remove(other)

    def deal(self, ranks: int) -> list[int] | None:
        """None where some weights have fewer groups than there are ranks."""
        groups = sorted(self.groups, key=min)
        kinds = [frozenset(self.weight[label] for label in group) for group in groups]
        result = [0] * len(self.weight)
        for kind in dict.fromkeys(kinds):
            alike = [group for group, own in zip(groups, kinds, strict=True) if own == kind]
            if len(alike) < ranks:
                return None
            rank_of = np.repeat(np.arange(ranks), split_sizes(len(alike), ranks)).tolist()
            for group, rank in zip(alike, rank_of, strict=True):
                for label in group:
                    result[label] = rank
        return result


def made(seed: int) -> tuple[Atoms, Written, list[Labels], np.random.Generator]:
    """A few weights, pieces of them joined: in runs, in strides (interleaved heads) and blockwise."""
    random = np.random.default_rng(seed)
    atoms, written = Atoms(), Written()
    labels = []
    for weight in range(random.integers(1, 5)):
        size = 4 * int(random.integers(1, 6))
        labels.append(atoms.create(f"layers.{weight}.weight", size))
        written.create(weight, size)
    for _ in range(random.integers(0, 5)):
        a, b = pieces(labels, random)
        atoms.union(a, b)
        written.union(a, b)
    return atoms, written, labels, random


def pieces(labels: list[Labels], random: np.random.Generator) -> tuple[Labels, Labels]:
    a, b = (labels[random.integers(len(labels))] for _ in range(2))
    step = int(random.integers(1, 3))
    a, b = a[::step], b[: len(b) // step]
    size = min(len(a), len(b))
    return a[:size], (b[len(b) - size :] if random.random() < 0.5 else np.repeat(b[: size // 4 + 1], 4)[:size])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_are_dealt_kind_by_kind(ranks: int):
    dealt = 0
    for seed in range(120):
        atoms, written, _, _ = made(seed)
        expected = written.deal(ranks)
        if expected is None:
            with pytest.raises(TooFew):
                atoms.deal(ranks)
            continue
        assert atoms.deal(ranks).tolist() == expected, seed
        dealt += 1
    assert dealt >= 20


def test_how_many_groups_there_would_be():
    counts = set()
    for seed in range(120):
        atoms, written, labels, random = made(seed)
        a, b = pieces(labels, random)
        before = atoms.deal(1).tolist(), atoms.groups(np.concatenate(labels))
        found = atoms.groups_joined(a, b)
        assert (atoms.deal(1).tolist(), atoms.groups(np.concatenate(labels))) == before  # a question only
        written.union(a, b)
        assert found == len({min(written.of(label)) for label in [*a.tolist(), *b.tolist()]}), seed
        counts.add(found)
    assert len(counts) > 5


def test_how_many_labels_differ():
    random = np.random.default_rng(0)
    for size, values in itertools.product((0, 1, 2, 7, 40), (1, 3, 50)):
        labels = random.integers(0, values, size)
        assert distinct(labels) == len(set(labels.tolist()))
        assert distinct(labels.reshape(1, -1)) == distinct(labels)


def test_what_is_shared_is_a_small_part_of_each_weight():
    atoms = Atoms()
    fused, other = atoms.create("fused", 12), atoms.create("other", 4)
    atoms.union(fused[8:10], other[:2])
    assert not atoms.share(fused[:5], 0.25)  # too much of the piece's own weight
    assert not atoms.share(fused[8:10], 0.25)  # of one that is joined to it
    assert not atoms.any_shared
    assert atoms.share(np.concatenate([fused[10:12], fused[10:12]]), 0.25)  # said twice, it is no more
    assert atoms.is_shared(fused).tolist() == [False] * 10 + [True] * 2
