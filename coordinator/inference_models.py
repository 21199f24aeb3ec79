"""What the Open Inference Protocol says about models: metadata, configuration, statistics, the repository's index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coordinator.dtypes import DataType
from coordinator.types import ModelStatistics
from protos.inference import message, pool
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

PLATFORM = "pytorch_tensor_parallel"
BACKEND = "tensor_parallel"

_METADATA: Any = message("ModelMetadataResponse")
_CONFIG: Any = message("ModelConfig")
_STATISTICS: Any = message("ModelStatistics")
_INDEX: Any = message("RepositoryIndexResponse")
_TYPES = pool.FindEnumTypeByName("inference.DataType").values_by_name
_GROUP: Any = message("ModelInstanceGroup")


def metadata(info: pb.ModelInfo, versions: list[str]) -> Any:
    """Shapes are whole, batch dimension included; -1 is a free size."""
    answer = _METADATA(name=info.name, versions=versions, platform=PLATFORM)
    for specs, tensors in ((info.inputs, answer.inputs), (info.outputs, answer.outputs)):
        for spec in specs:
            tensors.add(name=spec.name, datatype=DataType(spec.dtype).inference_name, shape=spec.shape)
    return answer


def config(info: pb.ModelInfo) -> Any:
    """Triton's reading of ``max_batch_size``: 0 says that dims are whole, more that they leave out a batch dimension.

    It is a limit that clients keep to, so it is only given for a model that has one (and whose tensors all begin with
    a free dimension); rows that are merely joined into one forward at most are a parameter.
    """
    tensors = [*info.inputs, *info.outputs]
    batched = bool(tensors) and all(spec.shape and spec.shape[0] == -1 for spec in tensors)
    limit = info.batching.max_batch_size if batched else 0
    answer = _CONFIG(name=info.name, platform=PLATFORM, backend=BACKEND, max_batch_size=limit)
    answer.version_policy.latest.num_versions = 1
    answer.model_transaction_policy.decoupled = False
    answer.instance_group.add(name=info.name, kind=_GROUP.KIND_MODEL, count=1)
    for specs, described in ((info.inputs, answer.input), (info.outputs, answer.output)):
        for spec in specs:
            dims = spec.shape[1:] if limit else spec.shape
            tensor = described.add(name=spec.name, data_type=_type(DataType(spec.dtype)), dims=dims)
            if spec.optional and hasattr(tensor, "optional"):
                tensor.optional = True
    if limit and info.batching.max_joined_rows != 1:
        answer.dynamic_batching.max_queue_delay_microseconds = info.batching.max_delay_microseconds
    parameters = {
        "plan_mode": info.plan_mode,
        "plan_digest": info.plan_digest,
        "weights_digest": info.weights_digest,
        "ranks": str(len(info.bytes_per_rank)),
        "max_joined_rows": str(info.batching.max_joined_rows),
    }
    for key, value in parameters.items():
        answer.parameters[key].string_value = value
    return answer


def _type(dtype: DataType) -> int:
    """Triton has no float8: TYPE_INVALID."""
    known = _TYPES.get(f"TYPE_{dtype.inference_name}")
    return known.number if known is not None else 0


def statistics(info: pb.ModelInfo, version: str, totals: ModelStatistics, device: str) -> Any:
    """``device`` is the kind of memory that holds the weights: "CPU" or "GPU"; ids are ranks."""
    answer = _STATISTICS(
        name=info.name,
        version=version,
        last_inference=totals.last_request_unix_ms,
        inference_count=totals.rows,
        execution_count=totals.executions,
    )
    stats = answer.inference_stats
    _duration(stats.success, totals.requests_ok, totals.success_ns)
    _duration(stats.fail, totals.requests_failed, totals.failed_ns)
    _duration(stats.queue, totals.requests_ok, totals.queue_ns)
    # The way to the ranks and back counts as preparing the inputs.
    travel = max(0, totals.compute_ns - totals.forward_ns - totals.copy_ns)
    _duration(stats.compute_input, totals.requests_ok, travel)
    _duration(stats.compute_infer, totals.requests_ok, totals.forward_ns)
    _duration(stats.compute_output, totals.requests_ok, totals.copy_ns)
    for rows, executions in sorted(totals.batches.items()):
        answer.batch_stats.add(batch_size=rows).compute_infer.count = executions
    for rank, held in enumerate(info.bytes_per_rank):
        answer.memory_usage.add(type=device, id=rank, byte_size=held)
    return answer


def _duration(field: Any, count: int, nanoseconds: int) -> None:
    field.count = count
    field.ns = nanoseconds


def index(infos: Iterable[pb.ModelInfo], reasons: dict[str, str], only_ready: bool) -> Any:
    """``reasons`` says, by model, why one does not serve."""
    answer = _INDEX()
    for info in infos:
        if info.serving or not only_ready:
            state = "READY" if info.serving else "UNAVAILABLE"
            reason = "" if info.serving else reasons.get(info.name, "")
            answer.models.add(name=info.name, version=info.version, state=state, reason=reason)
    return answer
