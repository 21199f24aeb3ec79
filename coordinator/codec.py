"""Tensors, requests and results of ``tensor_parallel.v1`` as our own types, payloads uncopied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.message import DecodeError

from coordinator import wire
from coordinator.dtypes import DataType
from coordinator.errors import InvalidArgument
from coordinator.types import Buffer, InferRequest, InferResult, RegionRef, TensorValue
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

TENSOR_DATA = 4  # Tensor.data
_REQUEST: wire.Path = {pb.ForwardRequest.INPUTS_FIELD_NUMBER: {TENSOR_DATA: wire.ONE}}
_DTYPES: dict[int, DataType] = {int(dtype): dtype for dtype in DataType}
_RESPONSE_OUTPUTS = pb.ForwardResponse.OUTPUTS_FIELD_NUMBER
_STREAM_REQUEST: wire.Path = {
    pb.ForwardStreamRequest.BEGIN_FIELD_NUMBER: _REQUEST,
    pb.ForwardStreamRequest.CHUNK_FIELD_NUMBER: {pb.TensorChunk.DATA_FIELD_NUMBER: wire.ONE},
}


def parse_forward(raw: Buffer) -> InferRequest:
    """Raises InvalidArgument when the bytes are no ForwardRequest, or a tensor's dtype or shape is none."""
    message = pb.ForwardRequest()
    if len(raw) >= wire.SMALL:
        return request_of(message, _parse(message, raw, _REQUEST))
    try:
        message.ParseFromString(bytes(raw))
    except DecodeError as error:
        raise InvalidArgument(f"the request is not a ForwardRequest: {error}") from None
    return request_of(message, [memoryview(tensor.data) for tensor in message.inputs])


def parse_stream(raw: Buffer) -> tuple[pb.ForwardStreamRequest, list[memoryview | None]]:
    """One message of a ForwardStream, and the payloads of its tensors or of its chunk."""
    message = pb.ForwardStreamRequest()
    return message, _parse(message, raw, _STREAM_REQUEST)


def _parse(
    message: pb.ForwardRequest | pb.ForwardStreamRequest, raw: Buffer, path: wire.Path
) -> list[memoryview | None]:
    try:
        small, payloads = wire.lift(raw, path)
        message.ParseFromString(small)
    except (wire.Malformed, DecodeError) as error:
        raise InvalidArgument(f"the request is not a {type(message).__name__}: {error}") from None
    return payloads


def request_of(message: pb.ForwardRequest, payloads: Sequence[memoryview | None]) -> InferRequest:
    """``payloads`` by input. Raises InvalidArgument."""
    inputs = [tensor_of(tensor, data) for tensor, data in zip(message.inputs, payloads, strict=True)]
    regions = {name: region_of(ref) for name, ref in message.output_regions.items()}
    return InferRequest(
        model=message.model,
        version=message.version,
        inputs=inputs,
        outputs=list(message.outputs),
        request_id=message.request_id,
        priority=message.priority,
        output_regions=regions,
    )


def region_of(ref: tensor_pb2.SharedMemoryRef) -> RegionRef:
    return RegionRef(ref.region, ref.offset, ref.byte_size)


def tensor_of(tensor: tensor_pb2.Tensor, data: memoryview | None) -> TensorValue:
    """``data`` is what was lifted out of ``tensor``. Raises InvalidArgument for a dtype or shape that is none."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidArgument(f"tensor {tensor.name!r} has no known dtype ({tensor.dtype})")
    shape = tuple(tensor.shape)
    if shape and min(shape) < 0:
        raise InvalidArgument(f"tensor {tensor.name!r} has a negative size in its shape {list(shape)}")
    if tensor.HasField("shared_memory"):
        return TensorValue(tensor.name, dtype, shape, None, region_of(tensor.shared_memory))
    return TensorValue(tensor.name, dtype, shape, data)


def tensor_pieces(number: int, value: TensorValue, segments: Iterable[Buffer] | None = None) -> list[Buffer]:
    """``value`` as field ``number``; its bytes are ``segments`` one after the other where given, else its ``data``."""
    head = tensor_pb2.Tensor(name=value.name, dtype=int(value.dtype), shape=value.shape)  # type: ignore[arg-type]
    if value.region is not None:
        ref = value.region
        head.shared_memory.region, head.shared_memory.offset, head.shared_memory.byte_size = (
            ref.region,
            ref.offset,
            ref.byte_size,
        )
        return wire.nested(number, (head.SerializeToString(),))
    data = list(segments) if segments is not None else ([value.data] if value.data is not None else [])
    pieces: list[Buffer] = [head.SerializeToString()]
    if data:
        pieces += wire.nested(TENSOR_DATA, data)
    return wire.nested(number, pieces)


def response_pieces(result: InferResult, *, data: bool = True) -> list[Buffer]:
    """A ForwardResponse; without ``data`` only what describes the outputs."""
    head = pb.ForwardResponse(model=result.model, version=result.version, request_id=result.request_id)
    pieces: list[Buffer] = [head.SerializeToString()]
    for output in result.outputs:
        pieces += tensor_pieces(_RESPONSE_OUTPUTS, output, None if data or output.region else ())
    return pieces
