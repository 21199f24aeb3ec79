"""The plan as data: what each rank holds, what a forward takes and gives, and which collectives it runs.

Plain values only: it prints, serialises, and has a digest by which ranks can agree that they made the same plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tensor_parallel.planner.shard import Shard

FREE = -1
"""A dimension of any size."""


@dataclass(frozen=True)
class InputSpec:
    """One tensor the model takes; ``bound`` is ``(low, high)``, inclusive, for an input used as an index."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bound: tuple[int, int] | None = None


@dataclass(frozen=True)
class OutputSpec:
    """One tensor the model gives, whole (``shard`` None) or left divided along one dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: Shard | None = None


@dataclass(frozen=True)
class Collective:
    """One collective of a forward: its payload at the sizes of the example, and the traced operation that needs it."""

    kind: str
    nbytes: int
    where: str


@dataclass(frozen=True)
class Reason:
    """Why a divided value was made whole."""

    where: str
    op: str
    why: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How one model runs on ``world_size`` ranks.

    ``mode`` is ``"graph"`` (the traced graph, proven) or ``"modules"`` (layers replaced one by one, each followed
    by a gather),
    the latter with the reason in ``notes``.
    """

    world_size: int
    mode: str
    shards: Mapping[str, Shard]
    tied: Mapping[str, str]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    collectives: tuple[Collective, ...]
    reasons: tuple[Reason, ...]
    bytes_per_rank: tuple[int, ...]
    total_bytes: int
    program: str = ""  # digest of the steps
    decisions: Mapping[str, str] = field(default_factory=dict)  # what the search chose, by weight
    training: bool = False
    verified: str = "no"
    notes: tuple[str, ...] = ()
    own_derivatives: tuple[str, ...] = ()  # where any: calls that record gradients run the model's own code
    artifact: Any = field(
        default=None, compare=False, repr=False
    )  # the compiled form, in the process that made the plan

    def summary(self) -> dict[str, Any]:
        """Counts of one forward's collectives, and the bytes the fullest rank holds of the model's."""
        kinds = [c.kind for c in self.collectives]
        return {
            "mode": self.mode,
            "all_reduces": kinds.count("all_reduce"),
            "all_gathers": kinds.count("all_gather"),
            "reduce_scatters": kinds.count("reduce_scatter"),
            "bytes_per_rank": max(self.bytes_per_rank),
            "total_bytes": self.total_bytes,
        }

    def to_json(self) -> str:
        """A canonical text: equal plans give equal texts."""
        return json.dumps(_plain(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote; ``instantiate`` traces the model again to run it."""
        data = json.loads(text)
        return cls(
            world_size=data["world_size"],
            mode=data["mode"],
            shards={name: _shard(item) for name, item in data["shards"].items()},
            tied=data["tied"],
            inputs=tuple(
                InputSpec(i["name"], _dtype(i["dtype"]), tuple(i["shape"]), tuple(i["bound"]) if i["bound"] else None)
                for i in data["inputs"]
            ),
            outputs=tuple(
                OutputSpec(o["name"], _dtype(o["dtype"]), tuple(o["shape"]), _shard(o["shard"]) if o["shard"] else None)
                for o in data["outputs"]
            ),
            collectives=tuple(Collective(**c) for c in data["collectives"]),
            reasons=tuple(Reason(r["where"], r["op"], r["why"], tuple(r["weights"])) for r in data["reasons"]),
            bytes_per_rank=tuple(data["bytes_per_rank"]),
            total_bytes=data["total_bytes"],
            program=data["program"],
            decisions=data["decisions"],
            training=data["training"],
            verified=data["verified"],
            notes=tuple(data["notes"]),
            own_derivatives=tuple(data["own_derivatives"]),
        )

    def digest(self) -> str:
        """Hash of the plan, however it was ``verified``: equal on every rank, or the ranks must not form a group."""
        return hashlib.sha256(replace(self, verified="").to_json().encode()).hexdigest()

    def __str__(self) -> str:
        summary = self.summary()
        lines = [
            f"{self.mode} plan for {self.world_size} ranks: {summary['bytes_per_rank'] / 2**20:.1f} MiB of "
            f"{self.total_bytes / 2**20:.1f} MiB per rank, {summary['all_reduces']} all-reduces, "
            f"{summary['all_gathers']} all-gathers, {summary['reduce_scatters']} reduce-scatters"
        ]
        for name, shard in self.shards.items():
            how = "whole" if shard.dim is None else f"dim {shard.dim}: " + " | ".join(_runs(r) for r in shard.runs)
            lines.append(f"  {name}  {how}")
        lines.extend(f"  {c.kind} of {c.nbytes} bytes at {c.where}" for c in self.collectives)
        lines.extend(f"  gathered at {r.where} ({r.op}): {r.why}" for r in self.reasons)
        lines.extend(f"  note: {note}" for note in self.notes)
        if self.own_derivatives:
            lines.append(f"  calls that record gradients run the model's own code: {'; '.join(self.own_derivatives)}")
        return "\n".join(lines)


def _runs(runs: tuple[tuple[int, int], ...]) -> str:
    shown = ", ".join(f"{a}:{b}" for a, b in runs[:4])
    return shown + (f", ... ({len(runs)} runs)" if len(runs) > 4 else "")


def _plain(plan: Plan) -> dict[str, Any]:
    data: dict[str, Any] = {
        "world_size": plan.world_size,
        "mode": plan.mode,
        "shards": {name: {"dim": s.dim, "runs": s.runs} for name, s in plan.shards.items()},
        "tied": dict(plan.tied),
        "inputs": [{"name": i.name, "dtype": str(i.dtype), "shape": i.shape, "bound": i.bound} for i in plan.inputs],
        "outputs": [
            {
                "name": o.name,
                "dtype": str(o.dtype),
                "shape": o.shape,
                "shard": {"dim": o.shard.dim, "runs": o.shard.runs} if o.shard else None,
            }
            for o in plan.outputs
        ],
        "collectives": [asdict(c) for c in plan.collectives],
        "reasons": [asdict(r) for r in plan.reasons],
        "bytes_per_rank": plan.bytes_per_rank,
        "total_bytes": plan.total_bytes,
        "program": plan.program,
        "decisions": dict(plan.decisions),
        "training": plan.training,
        "verified": plan.verified,
        "notes": plan.notes,
        "own_derivatives": plan.own_derivatives,
    }
    return data


def _shard(item: dict[str, Any]) -> Shard:
    return Shard(item["dim"], tuple(tuple((a, b) for a, b in runs) for runs in item["runs"]))


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{text!r} is not a dtype")
    return found
