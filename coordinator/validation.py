"""Requests held against what the model takes, before they cost a rank anything. Messages name the input and say why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordinator.catalog import ModelVersion
from coordinator.dtypes import DataType
from coordinator.errors import InvalidArgument
from coordinator.types import Accepted, InferRequest, TensorValue
from protos.tensor_parallel.v1 import tensor_pb2

FREE = -1


REMEMBERED = 4096  # forms of one model's requests


def check(request: InferRequest, entry: ModelVersion) -> Accepted:
    """Raises ServiceError for what the model does not take."""
    form = request.form
    accepted = entry.accepted.get(form)
    if accepted is None:
        accepted = _check_form(request, entry)
        if len(entry.accepted) >= REMEMBERED:
            entry.accepted.clear()
        entry.accepted[form] = accepted
    for value, size in zip(request.inputs, accepted.sizes, strict=True):
        given = memoryview(value.data or b"").nbytes
        if given != size:
            raise InvalidArgument(
                f"input {value.name!r} has {given} bytes, but its shape {list(value.shape)} of "
                f"{value.dtype.torch_name} takes {size}"
            )
    for index, spec in accepted.bounded:
        check_bounds(request.inputs[index], spec)
    return accepted


def _check_form(request: InferRequest, entry: ModelVersion) -> Accepted:
    info = entry.info
    assert info is not None
    specs = {spec.name: spec for spec in info.inputs}
    given: set[str] = set()
    for value in request.inputs:
        spec = specs.get(value.name)
        if spec is None:
            raise InvalidArgument(f"model {entry.name!r} has no input {value.name!r} (it has {_names(specs)})")
        if value.name in given:
            raise InvalidArgument(f"input {value.name!r} is given twice")
        given.add(value.name)
        _check_tensor(value, spec)
    missing = [name for name, spec in specs.items() if not spec.optional and name not in given]
    if missing:
        raise InvalidArgument(f"input {missing[0]!r} of model {entry.name!r} is missing")
    if not given:
        raise InvalidArgument(f"the request has no inputs (model {entry.name!r} takes {_names(specs)})")
    if request.outputs or request.output_regions:
        _check_outputs(request, [spec.name for spec in info.outputs], entry.name)
    rows = leading_size(request.inputs)
    limit = info.batching.max_batch_size
    batch = max((value.shape[0] for value in request.inputs if value.shape), default=0)
    if limit and batch > limit:
        raise InvalidArgument(f"a batch of {batch} rows is over the {limit} that model {entry.name!r} takes")
    bounded = [
        (index, specs[value.name]) for index, value in enumerate(request.inputs) if _is_bounded(specs[value.name])
    ]
    return Accepted(rows, tuple(value.byte_size for value in request.inputs), tuple(bounded))


def _is_bounded(spec: tensor_pb2.TensorSpec) -> bool:
    return DataType(spec.dtype).is_integer and (spec.HasField("minimum") or spec.HasField("maximum"))


def _check_tensor(value: TensorValue, spec: tensor_pb2.TensorSpec) -> None:
    if int(value.dtype) != int(spec.dtype):
        wanted = DataType(spec.dtype).torch_name
        raise InvalidArgument(f"input {value.name!r} is {value.dtype.torch_name}, the model takes {wanted}")
    _check_shape(value, spec.shape)


def _check_shape(value: TensorValue, wanted: Sequence[int]) -> None:
    if len(value.shape) != len(wanted):
        raise InvalidArgument(
            f"input {value.name!r} has {len(value.shape)} dimensions {list(value.shape)}, the model takes "
            f"{_shown(wanted)}"
        )
    for size, actual in zip(wanted, value.shape, strict=True):
        if size != actual and size != FREE:
            raise InvalidArgument(
                f"input {value.name!r} has shape {list(value.shape)}, the model takes {_shown(wanted)}"
            )
    if 0 in value.shape:
        raise InvalidArgument(f"input {value.name!r} is empty: its shape is {list(value.shape)}")


def _shown(wanted: Sequence[int]) -> str:
    return "[" + ", ".join("*" if size == FREE else str(size) for size in wanted) + "]"


def check_bounds(value: TensorValue, spec: tensor_pb2.TensorSpec) -> None:
    """Indices outside their table: the sharded lookup would turn them into silent zeros, or fail on the ranks."""
    elements = np.frombuffer(value.data or b"", dtype=value.dtype.storage_dtype)
    low, high = int(elements.min()), int(elements.max())
    wrong = low if spec.HasField("minimum") and low < spec.minimum else None
    wrong = high if spec.HasField("maximum") and high > spec.maximum else wrong
    if wrong is not None:
        low_bound = spec.minimum if spec.HasField("minimum") else "any"
        high_bound = spec.maximum if spec.HasField("maximum") else "any"
        raise InvalidArgument(
            f"input {value.name!r} has the value {wrong}, the model takes {low_bound} to {high_bound}"
        )


def _check_outputs(request: InferRequest, known: list[str], model: str) -> None:
    """A model that could not be traced tells its outputs only when it runs: then the ranks check."""
    for name in [*request.outputs, *request.output_regions]:
        if known and name not in known:
            raise InvalidArgument(f"model {model!r} has no output {name!r} (it has {', '.join(known)})")
    if len(set(request.outputs)) != len(request.outputs):
        raise InvalidArgument("an output is asked for twice")


def leading_size(inputs: Sequence[TensorValue]) -> int:
    """The leading size that all ``inputs`` share, or 0."""
    sizes = {value.shape[0] if value.shape else 0 for value in inputs}
    return sizes.pop() if len(sizes) == 1 else 0


def can_join(entry: ModelVersion) -> bool:
    """Whether every input and output has a free leading dimension, so that requests can share a forward."""
    info = entry.info
    assert info is not None
    specs = [*info.inputs, *info.outputs]
    return bool(info.inputs and info.outputs) and all(len(spec.shape) > 0 and spec.shape[0] == FREE for spec in specs)


def _names(specs: dict[str, tensor_pb2.TensorSpec]) -> str:
    return ", ".join(specs) or "none"
