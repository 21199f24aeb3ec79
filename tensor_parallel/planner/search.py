"""Choosing among proven plans: start from the solved one, then change how the weights behind costly communication are
divided.

Weights of the same role in different layers are changed together: their names differ in digits only and their shapes
agree. The
number of plans tried depends on the size of the graph alone, never on time, so that every rank arrives at the same
plan.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tensor_parallel.errors import PlanError
from tensor_parallel.planner import cost
from tensor_parallel.planner.atoms import TooFew
from tensor_parallel.planner.cost import Network
from tensor_parallel.planner.prover import Communication, Prover
from tensor_parallel.planner.solver import Division, Solver
from tensor_parallel.planner.tensors import Tensors, role
from tensor_parallel.planner.traced import Traced

log = logging.getLogger(__name__)

_WORK = 40_000  # graph nodes walked by one search
_RESTARTS = 50
_LARGE = 0.004  # of all bytes: a replicated weight above it is worth trying to store divided
Class = tuple[str, tuple[int, ...]]
Move = tuple[tuple[Class, ...], str]


@dataclass
class Candidate:
    """A proven plan."""

    modes: dict[str, str]
    divisions: dict[str, Division]
    prover: Prover
    communications: list[Communication]
    held: tuple[int, ...]
    score: float
    forced: dict[str, str] = field(default_factory=dict)


def search(
    traced: Traced,
    tensors: Tensors,
    ranks: int,
    network: Network,
    *,
    gather_outputs: bool = True,
    tries: int | None = None,
) -> Candidate:
    """The best plan found. Raises :class:`PlanError` when none can be proven."""
    size = max(1, len(traced.graph.nodes))
    budget = tries if tries is not None else min(120, max(6, _WORK // size))
    best = evaluate(traced, tensors, ranks, network, {}, gather_outputs)
    if ranks == 1:
        return best  # nothing is divided: all plans are this one
    tried: set[tuple[tuple[str, str], ...]] = set()
    classes = _classes(tensors)

    def attempt(move: Move) -> Candidate | None:
        """The plan after one change of ``best``, unless it was tried, cannot be proven, or too many were."""
        nonlocal budget
        groups, mode = move
        modes = {**best.modes, **{name: mode for group in groups for name in classes[group]}}
        key = tuple(sorted(modes.items()))
        if key in tried or budget <= 0:
            return None
        tried.add(key)
        budget -= 1
        try:
            found = evaluate(traced, tensors, ranks, network, modes, gather_outputs)
        except PlanError:
            return None
        return found if found.score < best.score - 1e-9 else None

    improved = True
    while improved and budget > 0:
        improved = False
        moves = _moves(best, tensors, classes, ranks)
        if budget >= 3 * len(moves):  # the best first: an early gain may bar the way to a greater one
            gains: list[tuple[float, Move]] = []
            top = best
            for move in moves:
                found = attempt(move)
                if found is not None:
                    gains.append((found.score, move))
                    top = min(top, found, key=lambda candidate: candidate.score)
            best, improved = top, bool(gains)
            moves = [move for _, move in sorted(gains)[1:]]
        for move in moves:
            found = attempt(move)
            if found is not None:
                log.debug("%s %s: %.4f -> %.4f", move[1], [g[0] for g in move[0]], best.score, found.score)
                best, improved = found, True
    return best


def evaluate(
    traced: Traced, tensors: Tensors, ranks: int, network: Network, modes: Mapping[str, str], gather_outputs: bool
) -> Candidate:
    """Solve and prove with the given modes."""
    modes = dict(modes)
    forced: dict[str, str] = {}
    for _ in range(_RESTARTS):
        solver = Solver(traced, tensors, ranks, {**modes, **forced})
        try:
            solver.run()
            divisions = solver.divisions()
            break
        except TooFew as too_few:
            new = {name: "rep" for name in too_few.weights if forced.get(name) != "rep"}
            if not new:
                raise PlanError(f"cannot divide {', '.join(sorted(too_few.weights))}") from too_few
            forced.update(new)
    else:
        raise PlanError("the division of weights does not settle")
    prover = prove(traced, tensors, ranks, divisions, {**modes, **forced}, gather_outputs)
    communications = prover.communications()
    held = cost.bytes_per_rank(tensors, divisions, ranks)
    return Candidate(
        modes,
        divisions,
        prover,
        communications,
        held,
        cost.score(tensors, held, communications, network, ranks),
        forced,
    )


def prove(
    traced: Traced,
    tensors: Tensors,
    ranks: int,
    divisions: Mapping[str, Division],
    modes: Mapping[str, str],
    gather_outputs: bool,
    sequence_parallel: bool = False,
) -> Prover:
    stored = frozenset(name for name, mode in modes.items() if mode == "store" and name in divisions)
    after = frozenset(name for name, mode in modes.items() if mode == "gather")
    prover = Prover(traced, tensors, ranks, divisions, stored, after, gather_outputs, sequence_parallel)
    prover.run()
    return prover


def _classes(tensors: Tensors) -> dict[Class, list[str]]:
    groups: dict[Class, list[str]] = defaultdict(list)
    for name, stored in tensors.stored.items():
        if stored.is_parameter:
            groups[_class(name, stored.shape)].append(name)
    return groups


def _class(name: str, shape: tuple[int, ...]) -> Class:
    return role(name), shape


def _moves(best: Candidate, tensors: Tensors, classes: Mapping[Class, list[str]], ranks: int) -> list[Move]:
    """Changes worth trying, the most promising first: of one class of weights, then of all behind a collective."""
    blame: dict[Class, int] = defaultdict(int)
    together: dict[tuple[Class, ...], None] = {}
    for item in best.communications:
        behind = {_class(n, tensors.shape(n)) for n in item.origin if tensors.stored[n].is_parameter}
        for group in behind:
            blame[group] += item.nbytes + 1
        if len(behind) > 1:
            together[tuple(sorted(behind))] = None
    moves: list[Move] = []
    for group in sorted(blame, key=lambda g: (-blame[g], g)):
        modes = [mode for mode in ("gather", "rep", "in") if best.modes.get(classes[group][0]) != mode]
        moves.extend(((group,), mode) for mode in modes)
        if best.modes.get(classes[group][0]) in ("in", "gather"):
            moves.append(((group,), "auto"))
    moves.extend((groups, "rep") for groups in together)
    changed = tuple(g for g in sorted(classes) if best.modes.get(classes[g][0]) in ("in", "gather"))
    moves.extend(((group,), "auto") for group in changed if group not in blame)
    if len(changed) > 1:
        moves.append((changed, "auto"))
    whole: dict[Class, int] = defaultdict(int)
    for name, stored in tensors.stored.items():
        if stored.is_parameter and name not in best.divisions:
            whole[_class(name, stored.shape)] += stored.nbytes
    for group in sorted(whole, key=lambda g: (-whole[g], g)):
        if whole[group] >= _LARGE * tensors.total_bytes and max(group[1], default=0) >= ranks:
            moves.append(((group,), "store"))
            if best.modes.get(classes[group][0], "auto") != "auto":
                moves.append(((group,), "auto"))
    return moves


def fixed(
    traced: Traced,
    tensors: Tensors,
    ranks: int,
    network: Network,
    divisions: Mapping[str, Division],
    gather_outputs: bool,
) -> Candidate:
    """The plan for tensors that are already divided.

    Whatever cannot be used as it lies is gathered, so this always succeeds.
    """
    prover = prove(traced, tensors, ranks, divisions, {}, gather_outputs)
    communications = prover.communications()
    held = cost.bytes_per_rank(tensors, divisions, ranks)
    return Candidate({}, dict(divisions), prover, communications, held, 0.0)
