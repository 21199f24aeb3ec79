"""What a plan costs: bytes per rank, and the time its collectives take on a given network.

Bytes come first: a weight that no rank holds whole is what tensor parallelism is for. Communication is priced in
seconds from the
latency and bandwidth of the group (the usual alpha-beta model; Thakur et al., "Optimization of Collective
Communication Operations
in MPICH", 2005), relative to the collectives a plan of this depth cannot avoid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from tensor_parallel.planner.placement import ALL, counts
from tensor_parallel.planner.prover import OUTPUT, Communication
from tensor_parallel.planner.solver import Division
from tensor_parallel.planner.tensors import Tensors

_PRICE = 0.24  # share of all bytes that avoiding every unavoidable-sized collective would be worth
_GATHER = 1.5  # an activation made whole is also copied, and computed on whole by every rank
_OUTPUT = 0.3  # a divided output is gathered once, by whoever wants it whole; a server need not do it at all
_SLACK = 0.04  # share above an even split up to which a byte costs its share, and beyond which four times that


@dataclass(frozen=True)
class Network:
    """A group's communication: ``seconds = latency + moved bytes / bandwidth``."""

    latency: float = 30e-6  # seconds per collective
    bandwidth: float = 20e9  # bytes per second, each way, per rank

    def seconds(self, kind: str, nbytes: int, ranks: int) -> float:
        """Ring algorithms: an all-reduce moves ``2 (n-1)/n`` of the payload, gathers and scatters ``(n-1)/n``."""
        if ranks == 1:
            return 0.0
        factor = 2 if kind == "all_reduce" else 1
        return self.latency + factor * (ranks - 1) / ranks * nbytes / self.bandwidth


def bytes_per_rank(tensors: Tensors, divisions: Mapping[str, Division], ranks: int) -> tuple[int, ...]:
    """Bytes of parameters and buffers that each rank holds."""
    held = [0] * ranks
    for name, stored in tensors.stored.items():
        division = divisions.get(name)
        owner = np.asarray(division[1] if division is not None else [ALL], dtype=np.int64)
        each = stored.nbytes // max(1, len(owner))
        for rank, count in enumerate(counts(owner, ranks)):
            held[rank] += each * count
    return tuple(held)


def seconds(communications: Iterable[Communication], network: Network, ranks: int) -> float:
    """Predicted time of one forward's collectives at the example's sizes."""
    return sum(network.seconds(c.kind, c.nbytes, ranks) for c in communications)


def score(
    tensors: Tensors, held: Sequence[int], communications: Sequence[Communication], network: Network, ranks: int
) -> float:
    """Lower is better: the fullest rank's share of the bytes, plus priced communication."""
    share = max(held) / max(1, tensors.total_bytes)
    excess = max(0.0, share - 1 / ranks - _SLACK)
    weights = sum(1 for s in tensors.stored.values() if s.is_parameter and len(s.shape) > 1)
    unit = _PRICE / (1 + weights / 3)
    sizes = [c.nbytes for c in communications if c.kind == "all_reduce"] or [c.nbytes for c in communications] or [1]
    reference = network.seconds("all_reduce", int(median(sizes)), ranks) or 1.0
    total, outputs = 0.0, 0
    for c in communications:
        weight = _GATHER if c.kind == "all_gather" else 1.0
        if c.where == OUTPUT:
            outputs += 1
            weight = _OUTPUT if outputs == 1 else 1.0
        total += weight * network.seconds(c.kind, c.nbytes, ranks) / reference
    return share + 3 * excess + unit * total
