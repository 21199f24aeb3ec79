"""Solving: run the rules on atoms, and let every operation join what it needs on one rank.

The outcome is a division for every parameter. It is only a proposal: the prover checks each step of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from tensor_parallel.partition import split_sizes
from tensor_parallel.planner.atoms import Atoms, Labels, TooFew
from tensor_parallel.planner.engine import Engine
from tensor_parallel.planner.placement import ALL, PARTIAL, REPLICATED, Owners, Place, Sharded, Undecided, Unproven
from tensor_parallel.planner.program import Ref
from tensor_parallel.planner.rules import PARTIAL_RULES, RULES
from tensor_parallel.planner.tensors import Tensors, differentiable
from tensor_parallel.planner.traced import Traced
from tensor_parallel.planner.values import Value

Division = tuple[int, Sequence[int] | Labels]
"""A dimension and the rank that owns each index along it."""

_WORTH_ADDING = 4096  # bytes: a smaller bias is added sooner by one rank than by each its part
_SHARED = 0.25  # of a weight: a piece up to this that cannot be divided as it is used is held by every rank
_MOST = 0.5
_WORTH = 0.002  # of all bytes: smaller lookup tables and computed weights are not worth a collective


class Solver(Engine):
    solving = True

    def __init__(self, traced: Traced, tensors: Tensors, ranks: int, modes: Mapping[str, str]) -> None:
        super().__init__(traced, ranks, 1, RULES, PARTIAL_RULES)
        self.tensors, self.modes = tensors, modes
        self.atoms = Atoms()
        self.decided: dict[str, tuple[int, Owners] | None] = {}
        self._cuts: dict[fx.Node, set[int]] = {}
        self._addends: set[str] = set()

    # ------------------------------------------------------------------ begin and end
    def begin(self) -> None:
        for node in self.traced.inputs:
            if node is not None:
                shapes, dtype = self._describe(node.meta["val"])
                self.env[node] = Value(None, REPLICATED, shapes, dtype, differentiable(dtype))
        for node, _ in self.traced.constants.values():
            shapes, dtype = self._describe(node.meta["val"])
            self.env[node] = Value(None, REPLICATED, shapes, dtype, False)
        for name, (node, _) in self.traced.states.items():
            shapes, dtype = self._describe(node.meta["val"])
            canonical = self.tensors.canonical(name)
            value = Value(None, REPLICATED, shapes, dtype, differentiable(dtype), weight=canonical)
            if self.modes.get(canonical, "auto") in ("auto", "in", "gather") and any(
                s >= self.ranks for s in shapes[0]
            ):
                value.place = Undecided(canonical, tuple(range(len(shapes[0]))))
            self.env[node] = value

    def finish(self) -> list[Any]:
        return []

    def divisions(self) -> dict[str, Division]:
        """The owner of every index of every divided parameter. Raises :class:`TooFew` when something cannot be
        dealt out."""
        rank_of = self.atoms.deal(self.ranks)
        result: dict[str, Division] = {}
        for name, choice in self.decided.items():
            if choice is not None:
                dim, owners = choice
                ranks = rank_of[owners[0]]
                if (ranks != ALL).any():
                    result[name] = (dim, ranks)
        for name, mode in self.modes.items():
            if mode == "store":
                shape = self.tensors.shape(name)
                dim = max(range(len(shape)), key=lambda d: (shape[d], -d))
                if shape[dim] >= self.ranks:
                    result[name] = self._even(name, dim)
        return result | {name: self._even(name, 0) for name in self._addends} | self._unread()

    def _unread(self) -> dict[str, Division]:
        """Tensors that the computation never reads (another task's head) cost nothing to hold divided."""
        read = {self.tensors.canonical(n) for n, (node, _) in self.traced.states.items() if node.users}
        updated = {self.tensors.canonical(name) for name in self.traced.updates}
        result: dict[str, Division] = {}
        for name, stored in self.tensors.stored.items():
            if name in read or name in updated or stored.nbytes < _WORTH * self.tensors.total_bytes:
                continue
            dim = max(range(len(stored.shape)), key=lambda d: (stored.shape[d], -d), default=None)
            if dim is not None and stored.shape[dim] >= self.ranks:
                result[name] = self._even(name, dim)
        return result

    def _even(self, name: str, dim: int) -> Division:
        sizes = split_sizes(self.tensors.shape(name)[dim], self.ranks)
        return dim, np.repeat(np.arange(self.ranks), sizes)

    # ------------------------------------------------------------------ atoms
    def unify(self, a: Owners, b: Owners) -> Owners:
        left, right = a[0], b[0]
        if left.shape != right.shape:
            raise Unproven("different sizes")
        shared = self.atoms.any_shared and self.atoms.is_shared(left)
        if shared is not False and (shared.any() or self.atoms.is_shared(right).any()):
            if (shared != self.atoms.is_shared(right)).any():
                raise Unproven("some indices are shared on one side only")
            self.atoms.union(left, right)
            return a
        for labels in (left, right):
            if self.atoms.groups(labels) < self.ranks:
                raise TooFew(self.atoms.weights(labels))
        if (self.atoms.find(left) == self.atoms.find(right)).all():
            return a  # nothing is left to join
        if self.atoms.groups_joined(left, right) < self.ranks:
            raise Unproven("would leave fewer parts than ranks")
        self.atoms.union(left, right)
        return a

    def regroup(self, labels: Sequence[Any], offset: int) -> tuple[int, Owners]:
        roots = self.atoms.find(labels[0])
        varying = [d for d in range(roots.ndim) if roots.shape[d] > 1 and not (roots == roots.take([0], axis=d)).all()]
        if len(varying) == 1:
            return varying[0], (_line(labels[0], varying[0]),)
        cuts = self._cut_dims()
        first = [d for d in varying if d + offset not in cuts]
        for dim in [*first, *(d for d in varying if d not in first)]:
            if self._join_rows(np.moveaxis(labels[0], dim, 0).reshape(labels[0].shape[dim], -1)):
                return dim, (_line(labels[0], dim),)
        raise Unproven("no dimension of the result can be divided")

    def regroup_rows(self, labels: Sequence[Any]) -> tuple[int, Owners]:
        if not self._join_rows(labels[0]):
            raise Unproven("fewer rows than ranks")
        return 0, (labels[0][:, 0],)

    def _join_rows(self, rows: np.ndarray) -> bool:
        """Join each row into one group, if enough groups remain."""
        if self.atoms.any_shared and (self.atoms.is_shared(rows) != self.atoms.is_shared(rows[:, :1])).any():
            return False
        roots = self.atoms.find(rows)
        first = np.broadcast_to(roots[:, :1], roots.shape)
        if rows.shape[0] < self.ranks or self.atoms.groups_joined(first, roots) < self.ranks:
            return False
        self.atoms.union(np.ascontiguousarray(first).reshape(-1), roots.reshape(-1))
        return True

    def _cut_dims(self) -> set[int]:
        assert self.node is not None
        if self.node not in self._cuts:
            self._cuts[self.node] = cut_dims(self.node)
        return self._cuts[self.node]

    def every_rank(self, owner: Any) -> bool:
        return self.atoms.groups(owner) >= self.ranks

    def share(self, owners: Owners) -> bool:
        return self.atoms.share(owners[0], _SHARED)

    def cut(self, owners: Owners) -> None:
        self.atoms.cut(owners[0])

    # ------------------------------------------------------------------ parameters
    def place(self, value: Value) -> Place:
        place = value.place
        if isinstance(place, Sharded) and self.atoms.any_shared and self.atoms.is_shared(place.owners[0]).all():
            return REPLICATED
        if not isinstance(place, Undecided) or place.param not in self.decided:
            return place
        choice = self.decided[place.param]
        if choice is None:
            return REPLICATED
        dim, owners = choice
        if self.atoms.any_shared and self.atoms.is_shared(owners[0]).all():
            return REPLICATED
        if dim in place.dims:
            return Sharded(place.dims.index(dim), owners, frozenset({place.param}))
        return PARTIAL if place.looked_up and dim == 0 else REPLICATED

    def commit(self, value: Value, dim: int | None = None, owners: Owners | None = None) -> None:
        place = self.place(value)
        if not isinstance(place, Undecided):
            return
        name, shape = place.param, self.tensors.shape(place.param)
        if dim is not None and owners is not None:
            at = place.dims[dim]
            fits = at is not None and shape[at] == len(owners[0])
            self.decided[name] = (at, owners) if fits and at is not None else None
            return
        if place.looked_up and self.worth_dividing(value):
            for at in (1, 0) if self.prefer(value) == "in" else (0, 1):
                if at < len(shape) and shape[at] >= self.ranks and (at == 0 or at in place.dims):
                    self.decided[name] = (at, (self._create(name, at),))
                    return
        self.decided[name] = None

    def commit_whole(self, value: Value) -> None:
        place = self.place(value)
        if isinstance(place, Undecided):
            self.decided[place.param] = None

    def settle_addend(self, value: Value) -> None:
        place = self.place(value)
        if not isinstance(place, Undecided):
            return
        self.decided[place.param] = None  # as for whoever else uses it: the sum does not depend on who adds what
        shape, nbytes = self.tensors.shape(place.param), self.tensors.nbytes(place.param)
        dividable = len(shape) == 1 and shape[0] >= self.ranks and nbytes >= _WORTH_ADDING
        if dividable and self._is_sole_use(value, place.param):
            self._addends.add(place.param)

    def _is_sole_use(self, value: Value, param: str) -> bool:
        """Whether ``value`` is the parameter itself, read by nothing else."""
        nodes = [node for name, (node, _) in self.traced.states.items() if self.tensors.canonical(name) == param]
        return any(self.env[node] is value for node in nodes) and sum(len(node.users) for node in nodes) == 1

    def divide(self, value: Value, dim: int) -> Owners:
        place = self.place(value)
        if not isinstance(place, Undecided):
            raise Unproven("already settled")
        at = place.dims[dim]
        if not self.tensors.stored[place.param].is_parameter:
            raise Unproven("a buffer is divided only as its uses are")
        if at is None or self.tensors.shape(place.param)[at] < self.ranks:
            raise Unproven("too small to divide")
        owners = (self._create(place.param, at),)
        self.decided[place.param] = (at, owners)
        return owners

    def _create(self, name: str, dim: int) -> np.ndarray:
        return self.atoms.create(name, self.tensors.shape(name)[dim])

    def settle_for_pieces(self, value: Value, dim: int) -> bool:
        try:
            self.divide(value, dim)
        except Unproven:
            return False
        return True

    def settle_for_reshape(self, value: Value) -> None:
        place = self.place(value)
        if isinstance(place, Undecided) and place.looked_up:
            self.commit(value)
        elif self.worth_dividing(value):
            order = range(value.ndim) if self.prefer(value) == "auto" else reversed(range(value.ndim))
            for dim in order:
                try:
                    self.divide(value, dim)
                    return
                except Unproven:
                    continue
        self.commit_whole(value)

    def prefer(self, value: Value) -> str:
        return self.modes.get(value.weight or "", "auto")

    def gathers_after(self, weights: Sequence[str | None]) -> bool:
        return any(self.modes.get(w or "") == "gather" for w in weights)

    def worth_dividing(self, value: Value) -> bool:
        return value.weight is not None and self.tensors.nbytes(value.weight) >= _WORTH * self.tensors.total_bytes

    # ------------------------------------------------------------------ communication, without any
    def emit(self, fn: Any, *args: Any, **kwargs: Any) -> Ref | None:
        return None

    def full(self, value: Value, why: str) -> Value:
        self.commit_whole(value)
        if self.place(value) is REPLICATED or value.place is REPLICATED:
            return value
        if value.whole is None:
            if isinstance(value.place, Sharded):
                self.share(value.place.owners)  # if it is small: held by all, it needs no gathering
            value.whole = Value(None, REPLICATED, value.shapes, value.dtype, value.grad)
        return value.whole

    def enter(self, value: Value) -> Ref | None:
        return None

    def part(self, value: Value, dim: int, owners: Owners) -> Ref | None:
        place = self.place(value)
        if isinstance(place, Undecided):
            self.commit(value, dim, owners)
        elif isinstance(place, Sharded):
            if place.dim != dim:
                raise Unproven("divided along another dimension")
            self.unify(owners, place.owners)
        return None


def _line(labels: np.ndarray, dim: int) -> np.ndarray:
    """The labels along ``dim`` at the first index of every other dimension."""
    return labels[tuple(slice(None) if d == dim else 0 for d in range(labels.ndim))].copy()


_PERMUTING = (
    "transpose",
    "permute",
    "clone",
    "contiguous",
    "to",
    "_to_copy",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
)
_CUTTING = ("select", "unbind", "split", "chunk", "split_with_sizes", "slice")


def cut_dims(node: fx.Node) -> set[int]:
    """Dimensions of a result that its consumers take apart (``q, k, v = x.unbind(2)``): no good for dividing.

    Unless most of the dimension is one piece (the query heads of multi-query attention): the rest may be shared.
    """
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return set()
    largest: dict[int, float] = {}
    todo: list[tuple[fx.Node, list[int]]] = [(node, list(range(fake.ndim)))]
    while todo:
        current, order = todo.pop()
        for user in current.users:
            schema = getattr(user.target, "_schema", None)
            name = schema.name.split("::")[1] if schema is not None else ""
            if not user.args or user.args[0] is not current:
                continue
            if name in _PERMUTING:
                todo.append((user, _permuted(name, user, order)))
            elif name in _CUTTING:
                dim = _argument(user, "dim", 0)
                if isinstance(dim, int) and not _whole_slice(name, user):
                    at = order[dim % len(order)]
                    largest[at] = max(largest.get(at, 0.0), _largest_piece(name, user, current, dim))
    return {at for at, share in largest.items() if share <= _MOST}


def _largest_piece(name: str, user: fx.Node, source: fx.Node, dim: int) -> float:
    """The share of ``source``'s dimension that the largest piece taken by ``user`` has."""
    whole = source.meta["val"].shape[dim]
    if name in ("select", "unbind") or not isinstance(whole, int):
        return 0.0
    pieces = user.meta["val"] if isinstance(user.meta["val"], (list, tuple)) else [user.meta["val"]]
    return max((p.shape[dim] / whole for p in pieces if isinstance(p.shape[dim], int)), default=0.0)


def _permuted(name: str, user: fx.Node, order: list[int]) -> list[int]:
    if name == "unsqueeze":
        at = int(user.args[1]) % (len(order) + 1)  # type: ignore[arg-type]
        return [*order[:at], -1, *order[at:]]
    if name == "squeeze":
        sizes = user.args[0].meta["val"].shape  # type: ignore[union-attr]
        asked = user.args[1] if len(user.args) > 1 else list(range(len(order)))
        gone = {int(d) % len(order) for d in (asked if isinstance(asked, (list, tuple)) else [asked])}  # type: ignore[arg-type]
        return [source for d, source in enumerate(order) if d not in gone or sizes[d] != 1]
    if name == "transpose":
        a, b = (int(d) % len(order) for d in user.args[1:3])  # type: ignore[arg-type]
        order = list(order)
        order[a], order[b] = order[b], order[a]
    elif name == "permute":
        order = [order[int(d) % len(order)] for d in user.args[1]]  # type: ignore[union-attr, arg-type]
    return order


def _argument(user: fx.Node, name: str, default: Any) -> Any:
    if name in user.kwargs:
        return user.kwargs[name]
    arguments = user.target._schema.arguments  # type: ignore[union-attr]
    position = next((i for i, a in enumerate(arguments) if a.name == name), None)
    if position is not None and position < len(user.args):
        return user.args[position]
    return default


def _whole_slice(name: str, user: fx.Node) -> bool:
    if name != "slice":
        return False
    fake, source = user.meta.get("val"), user.args[0]
    return isinstance(fake, torch.Tensor) and fake.shape == source.meta["val"].shape  # type: ignore[union-attr]
