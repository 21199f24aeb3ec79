"""The calls themselves, as data: methods, requests from Python arguments, answers as plain dictionaries. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from coordinator.client import wire
from coordinator.client.arrays import WireTensor, from_wire, to_wire
from coordinator.client.errors import InvalidInputError, RequestError
from coordinator.client.memory import Regions
from coordinator.types import Buffer
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

Json = dict[str, Any]
_SERVICE = "/tensor_parallel.v1.Coordinator/"

LOAD = _SERVICE + "Load"
UNLOAD = _SERVICE + "Unload"
FORWARD = _SERVICE + "Forward"
FORWARD_STREAM = _SERVICE + "ForwardStream"
HEALTH = _SERVICE + "Health"
LIST_MODELS = _SERVICE + "ListModels"
PLAN = _SERVICE + "Plan"
REGISTER = _SERVICE + "RegisterSharedMemory"
UNREGISTER = _SERVICE + "UnregisterSharedMemory"

# A message beyond 2 GiB does not exist in protobuf; well below it, streaming in pieces also needs less memory.
STREAM_ABOVE = 1 << 30


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """One forward, ready to be sent as often as needed."""

    head: pb.ForwardRequest
    tensors: list[WireTensor]
    as_torch: bool
    streamed: bool
    regions: Regions

    @property
    def request_id(self) -> str:
        return self.head.request_id

    def encode(self) -> bytes:
        return wire.encode_forward(self.head, self.tensors)

    def decode(self, message: Buffer) -> dict[str, Any]:
        """The outputs by name. Raises RequestError (INTERNAL) if ``message`` is not a response."""
        try:
            found = {meta.name: self.output(meta, data) for meta, data in wire.decode_forward(message)}
        except RequestError as error:
            error.request_id = self.request_id
            raise
        except Exception as error:  # protobuf's DecodeError is a plain Exception
            raise RequestError(
                grpc.StatusCode.INTERNAL, f"the answer cannot be read: {error}", request_id=self.request_id
            ) from None
        return found

    def output(self, meta: tensor_pb2.Tensor, data: memoryview | bytearray) -> Any:
        """The array of an output; one in shared memory is a view of that."""
        if meta.HasField("shared_memory"):
            data = self.regions.view(meta.shared_memory)
        return from_wire(meta.dtype, meta.shape, data, as_torch=self.as_torch)


def forward_call(
    model: str,
    inputs: Mapping[str, Any],
    outputs: Sequence[str] | None,
    request_id: str,
    version: str,
    priority: int,
    streamed: bool | None,
    into: Mapping[str, Any] | None = None,
    regions: Regions | None = None,
) -> ForwardCall:
    """Raises InvalidInputError for inputs that are no tensors, and for ``into`` outside ``regions``."""
    if isinstance(outputs, str):
        raise InvalidInputError(f"outputs is the string {outputs!r}; give a list of output names", request_id)
    try:
        regions = regions or Regions({})
        tensors, any_torch = to_wire(inputs, regions.find)
        targets = dict(regions.targets(into or {}))
    except InvalidInputError as error:
        error.request_id = request_id
        raise
    try:
        head = pb.ForwardRequest(
            model=model, version=str(version), outputs=outputs or (), request_id=request_id, priority=priority
        )
        for name, ref in targets.items():
            head.output_regions[name].CopyFrom(ref)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"not a forward request: {error}", request_id) from None
    size = sum(tensor.data.nbytes for tensor in tensors)
    return ForwardCall(head, tensors, any_torch, size > STREAM_ABOVE if streamed is None else streamed, regions)


def load_options(
    *,
    kind: str = "",
    dtype: str = "",
    architecture: str = "",
    inputs: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    verify: bool | None = None,
    max_batch_size: int = 0,
    max_joined_rows: int = 0,
    max_delay: float = 0.0,
    arguments: Mapping[str, Any] | None = None,
    execution: str = "",
) -> pb.LoadOptions:
    """LoadOptions from Python values. Raises InvalidInputError for one of the wrong type or range.

    ``inputs`` gives (element type, shape) by input name where they cannot be inferred, -1 being a free dimension;
    ``max_delay`` is in seconds; ``arguments`` are a factory's, or override a Hugging Face directory's config.
    """
    try:
        options = pb.LoadOptions(
            kind=kind,
            dtype=dtype,
            architecture=architecture,
            inputs=[
                tensor_pb2.TensorSpec(name=name, dtype=type_.upper(), shape=shape)  # type: ignore[arg-type]
                for name, (type_, shape) in (inputs or {}).items()
            ],
            batching=pb.BatchingOptions(
                max_joined_rows=max_joined_rows,
                max_delay_microseconds=round(max_delay * 1e6),
                max_batch_size=max_batch_size,
            ),
            arguments_json=json.dumps(dict(arguments)) if arguments else "",
            execution=execution,
        )
        if verify is not None:
            options.verify = verify
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"not a load option: {error}") from None
    return options


def load_request(name: str, path: object, version: str, options: Mapping[str, Any]) -> pb.LoadRequest:
    """Raises InvalidInputError for options that do not exist or do not fit."""
    try:
        return pb.LoadRequest(name=name, path=str(path), version=str(version), options=load_options(**options))
    except TypeError as error:
        raise InvalidInputError(f"not a load request: {error}") from None


def loaded(last: pb.LoadProgress) -> Json:
    """The model's description from the last report. Raises RequestError if the load ended without serving."""
    if last.stage != pb.LoadProgress.SERVING:
        stage = pb.LoadProgress.Stage.Name(last.stage)
        raise RequestError(grpc.StatusCode.INTERNAL, f"the load ended at stage {stage}, before it served")
    return to_dict(last.model)


def plan_answer(answer: pb.PlanResponse) -> Json:
    report: Json = json.loads(answer.report_json or "{}")
    return report | {"fits": answer.fits}


def to_dict(message: Message) -> Json:
    """Every field by name, unset ones included; enums by name, absent optional values None. Integers stay integers."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: _plain(item, field.message_type.fields_by_name["value"]) for key, item in value.items()}
    if field.is_repeated:
        return [_plain(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _plain(value, field)


def _plain(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return to_dict(value)
    if field.enum_type is not None:
        found = field.enum_type.values_by_number.get(value)
        name = found.name if found is not None else str(value)
        return name.lower() if field.enum_type.name == "DataType" else name
    return value
