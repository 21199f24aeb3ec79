"""What a plan means on a given machine: bytes, predicted communication time, and whether it fits."""

from __future__ import annotations

from typing import Any

from tensor_parallel.planner.cost import Network
from tensor_parallel.planner.plan import Plan


def describe(plan: Plan, *, device_memory: int | None = None, network: Network | None = None) -> dict[str, Any]:
    """Plain values for printing or JSON.

    Args:
        device_memory: bytes of one device; ``fits`` compares the fullest rank's weights with it (None: not asked).
        network: latency and bandwidth to predict with.
    """
    network = network or Network()
    collectives = [
        {
            "kind": item.kind,
            "bytes": item.nbytes,
            "where": item.where,
            "seconds": network.seconds(item.kind, item.nbytes, plan.world_size),
        }
        for item in plan.collectives
    ]
    return {
        **plan.summary(),
        "ranks": plan.world_size,
        "bytes_by_rank": list(plan.bytes_per_rank),
        "collectives": collectives,
        "predicted_seconds": sum(item["seconds"] for item in collectives),
        "device_memory": device_memory,
        "fits": None if device_memory is None else max(plan.bytes_per_rank) <= device_memory,
        "shards": {
            name: {"dim": shard.dim, "runs": [list(map(list, runs)) for runs in shard.runs]}
            for name, shard in plan.shards.items()
        },
        "gathered": [{"where": r.where, "op": r.op, "why": r.why, "weights": list(r.weights)} for r in plan.reasons],
        "verified": plan.verified,
        "notes": list(plan.notes),
        "digest": plan.digest(),
    }
