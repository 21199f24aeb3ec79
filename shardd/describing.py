"""What a loaded or planned model is, in messages: inputs, outputs, digests, sizes, collectives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2, tensor_pb2
from shardd.models import State
from shardd.tensors import WIRE_DTYPES

if TYPE_CHECKING:
    import torch

    from tensor_parallel.planner import OutputSpec, Plan
    from tensor_parallel.serving import ServedModel


def describe_model(
    request: shard_pb2.ShardLoadRequest, served: ServedModel, rank: int, warnings: list[str]
) -> shard_pb2.LoadedModel:
    """The loaded model as the status shows it and as the coordinator needs it to check and assemble."""
    plan = served.plan
    return shard_pb2.LoadedModel(
        name=request.name,
        version=request.version,
        state=State.LOADED.value,
        source_digest=served.source_digest,
        plan_digest=served.plan_digest,
        shard_digest=served.shard_digest,
        bytes_held=served.bytes_held,
        info=coordinator_pb2.ModelInfo(
            name=request.name,
            version=request.version,
            path=request.path,
            inputs=_inputs(served),
            outputs=[_spec(output.name, output.dtype, output.shape) for output in plan.outputs],
            plan_mode=plan.mode,
            plan_digest=served.plan_digest,
            weights_digest=served.source_digest,
            bytes_per_rank=plan.bytes_per_rank,
            total_bytes=plan.total_bytes,
            collectives=_collectives(plan),
            batching=request.options.batching if request.options.HasField("batching") else None,
            warnings=warnings,
        ),
        placements=[_placement(output, rank) for output in plan.outputs],
    )


def _spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tensor_pb2.TensorSpec:
    return tensor_pb2.TensorSpec(
        name=name,
        dtype=WIRE_DTYPES.get(dtype, tensor_pb2.DATA_TYPE_UNSPECIFIED),  # type: ignore[arg-type]
        shape=shape,
    )


def _inputs(served: ServedModel) -> list[tensor_pb2.TensorSpec]:
    specs = []
    for given in served.inputs:
        spec = _spec(given.name, given.dtype, given.shape)
        spec.optional = given.name in served.optional_inputs
        if given.bound is not None:
            spec.minimum, spec.maximum = given.bound
        specs.append(spec)
    return specs


def _placement(output: OutputSpec, rank: int) -> shard_pb2.OutputPlacement:
    placement = shard_pb2.OutputPlacement(name=output.name, sharded=is_sharded(output))
    if output.shard is not None and output.shard.dim is not None:
        placement.dim = output.shard.dim
        for start, stop in output.shard.runs[rank]:
            placement.runs.add(start=start, stop=stop)
    return placement


def is_sharded(output: OutputSpec) -> bool:
    """Whether each rank holds a part of this output, instead of every rank all of it."""
    return output.shard is not None and output.shard.dim is not None


def _collectives(plan: Plan) -> Mapping[str, int]:
    summary = plan.summary()
    return {name: summary[name] for name in ("all_reduces", "all_gathers", "reduce_scatters")}


def plan_report(plan: Plan, path: str, device_memory: int) -> coordinator_pb2.PlanResponse:
    """What sharding costs, as JSON; ``fits`` if the fullest rank's weights are smaller than ``device_memory`` bytes."""
    fits = max(plan.bytes_per_rank) <= device_memory
    report: dict[str, Any] = {
        "path": path,
        "ranks": plan.world_size,
        "mode": plan.mode,
        "total_bytes": plan.total_bytes,
        "bytes_per_rank": list(plan.bytes_per_rank),
        "collectives": dict(_collectives(plan)),
        "gathered": [{"where": reason.where, "why": reason.why} for reason in plan.reasons],
        "notes": list(plan.notes),
        "verified": plan.verified,
        "digest": plan.digest(),
        "device_memory": device_memory,
        "fits": fits,
    }
    return coordinator_pb2.PlanResponse(report_json=json.dumps(report), fits=fits)
