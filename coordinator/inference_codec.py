"""ModelInfer's bytes to our request, and our result to ModelInfer's bytes.

Tensor payloads are never parsed: on the way in each is a memoryview of the message that arrived, on the way out it is
joined once into the answer.  Answers are always raw, because clients read nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from coordinator import wire
from coordinator.dtypes import DataType, from_inference_name
from coordinator.errors import InvalidArgument, ServiceError
from coordinator.types import Buffer, InferRequest, InferResult, RegionRef, TensorValue
from protos.inference import message

_REQUEST: Any = message("ModelInferRequest")
_RESPONSE: Any = message("ModelInferResponse")
_STREAMED: Any = message("ModelStreamInferResponse")
_RAW_INPUT = 7  # ModelInferRequest.raw_input_contents
_RAW_INPUTS = {_RAW_INPUT: wire.MANY}
_ID, _RAW_OUTPUTS = 3, 6  # ModelInferResponse.id and .raw_output_contents
_STREAM_RESPONSE = 2  # ModelStreamInferResponse.infer_response
_REMEMBERED = 1024  # requests, and answers, whose beginnings are known
_LONGEST = 4096  # bytes of a beginning that is remembered

# Where the protocol puts typed elements. FP16, BF16 and float8 have no field: they travel raw.
_TYPED = {
    DataType.BOOL: "bool_contents",
    DataType.INT8: "int_contents",
    DataType.INT16: "int_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FLOAT32: "fp32_contents",
    DataType.FLOAT64: "fp64_contents",
}


@dataclass(slots=True)
class Decoded:
    """``id`` is the client's own, echoed in the answer; ``timeout`` is in seconds, None when the client set none."""

    request: InferRequest
    id: str
    timeout: float | None


class _Known:
    """Requests that differ from an earlier one in nothing but the bytes of their only input, which come last.

    A message of protobuf's is what its fields are one after another. So if the beginning is the same up to the length
    of that input, and is followed by as many bytes, all else is as it was.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}  # of the input, by length of the message
        self._beginnings: dict[bytes, tuple[Decoded, int]] = {}  # with the input's size

    def find(self, data: Buffer) -> Decoded | None:
        size = self._sizes.get(len(data))
        found = None if size is None else self._beginnings.get(bytes(data[:-size]))
        if size is None or found is None or found[1] != size:  # the last: it was cut short, or has more behind it
            return None
        known = found[0]
        like = known.request
        value = TensorValue(like.inputs[0].name, like.inputs[0].dtype, like.inputs[0].shape, memoryview(data)[-size:])
        request = InferRequest(like.model, [value], like.version, list(like.outputs), priority=like.priority)
        return Decoded(request, "", known.timeout)

    def remember(self, data: Buffer, decoded: Decoded) -> None:
        request = decoded.request
        if decoded.id or len(request.inputs) != 1 or request.output_regions:
            return  # with an id of its own no two requests begin alike
        value = request.inputs[0]
        size = value.byte_size
        length = wire.varint(_RAW_INPUT << 3 | wire.LENGTH) + wire.varint(size)
        before = bytes(data[: -size - len(length)])
        if not size or len(before) > _LONGEST or data[len(before) : -size] != length or not _is_complete(before):
            return
        if len(self._beginnings) >= _REMEMBERED:
            self._sizes.clear()
            self._beginnings.clear()
        kept = InferRequest(request.model, [replace(value, data=None)], request.version, list(request.outputs))
        kept.priority = request.priority
        self._sizes[len(data)] = size
        self._beginnings[before + length] = Decoded(kept, "", decoded.timeout), size


def _is_complete(before: bytes) -> bool:
    """Whether ``before`` is a request by itself, in which the bytes of no input have come yet."""
    try:
        return not _REQUEST.FromString(before).raw_input_contents
    except DecodeError:
        return False


_known = _Known()


def decode(data: Buffer) -> Decoded:
    """Raises InvalidArgument for anything that the message alone shows to be wrong."""
    decoded = _known.find(data)
    if decoded is None:
        decoded = _decode(data)
        _known.remember(data, decoded)
    return decoded


def _decode(data: Buffer) -> Decoded:
    raws: list[Buffer]
    try:
        if len(data) < wire.SMALL:
            header = _REQUEST.FromString(data)
            raws = list(header.raw_input_contents)
        else:
            rest, views = wire.lift(data, _RAW_INPUTS)
            header = _REQUEST.FromString(rest)
            raws = [view for view in views if view is not None]
    except (wire.Malformed, DecodeError) as error:
        raise InvalidArgument(f"the request is no ModelInferRequest: {error}") from None
    request = InferRequest(
        model=header.model_name,
        version=header.model_version,
        inputs=_inputs(header, raws),
        priority=_integer(header.parameters, "priority", 2**32 - 1) or 0,
    )
    for output in header.outputs:
        request.outputs.append(output.name)
        if output.parameters:
            _requested(output, request)
    timeout = _integer(header.parameters, "timeout", 2**63 - 1)
    return Decoded(request, header.id, timeout / 1e6 if timeout else None)


def encode(result: InferResult, id: str, *, final: bool = False) -> list[Buffer]:
    """The pieces of a ModelInferResponse; ``final`` marks a stream's last (and here only) answer to a request."""
    outputs = tuple([(value.name, value.dtype, value.shape, value.region) for value in result.outputs])
    form = (result.model, result.version, final, outputs)
    header = _headers.get(form)
    if header is None:
        header = _header(result, final)
        if len(_headers) >= _REMEMBERED:
            _headers.clear()
        _headers[form] = header
    pieces: list[Buffer] = [header, *(wire.payload(_ID, id.encode()) if id else ())]
    for value in result.outputs:
        # One entry for each output, empty when it went to shared memory: clients match the two lists by position.
        data = b"" if value.region is not None or value.data is None else wire.flat(value.data)
        pieces += wire.payload(_RAW_OUTPUTS, data)
    return pieces


_headers: dict[tuple[Any, ...], bytes] = {}
"""All of an answer but its id and the outputs' bytes, by everything that it depends on."""


def _header(result: InferResult, final: bool) -> bytes:
    header = _RESPONSE(model_name=result.model, model_version=result.version)
    if final:
        header.parameters["triton_final_response"].bool_param = True
    for value in result.outputs:
        output = header.outputs.add(name=value.name, datatype=value.dtype.inference_name, shape=value.shape)
        if value.region is not None:
            output.parameters["shared_memory_region"].string_param = value.region.region
            output.parameters["shared_memory_offset"].int64_param = value.region.offset
            output.parameters["shared_memory_byte_size"].int64_param = value.byte_size
    serialized: bytes = header.SerializeToString()
    return serialized


def encode_streamed(result: InferResult, id: str) -> list[Buffer]:
    """The pieces of a ModelStreamInferResponse."""
    return wire.nested(_STREAM_RESPONSE, encode(result, id, final=True))


def encode_failure(error: ServiceError, id: str) -> bytes:
    """A failed request as a stream answers it: in-band, and the stream goes on."""
    answer = _STREAMED(error_message=error.message or error.code.name)
    answer.infer_response.id = id
    parameters = answer.infer_response.parameters
    parameters["triton_final_response"].bool_param = True
    parameters["status"].string_param = error.code.name
    if error.retry_after_ms is not None:
        parameters["retry_after_ms"].int64_param = error.retry_after_ms
    data: bytes = answer.SerializeToString()
    return data


def _inputs(header: Any, raws: list[Buffer]) -> list[TensorValue]:
    values, used = [], 0
    for tensor in header.inputs:
        dtype = _dtype(tensor)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape):
            raise InvalidArgument(f"input {tensor.name!r} has a negative size in its shape {list(shape)}")
        region = _region(tensor.parameters, f"input {tensor.name!r}") if tensor.parameters else None
        data: Buffer | None = None
        if region is not None:
            if tensor.HasField("contents"):
                raise InvalidArgument(f"input {tensor.name!r} has both contents and a shared-memory region")
        elif raws:
            if tensor.HasField("contents"):
                raise InvalidArgument(
                    f"contents field must not be specified when using raw_input_contents for {tensor.name!r} "
                    f"for model {header.model_name!r}"
                )
            if used == len(raws):
                raise InvalidArgument(f"raw_input_contents has no entry for input {tensor.name!r}")
            data, used = raws[used], used + 1
            _check_bytes(tensor.name, len(data), prod(shape) * dtype.size)
        else:
            data = _typed(tensor, dtype, prod(shape))
        values.append(TensorValue(tensor.name, dtype, shape, data, region))
    if used != len(raws):
        raise InvalidArgument(f"raw_input_contents has {len(raws)} entries, but {used} inputs take one")
    return values


def _dtype(tensor: Any) -> DataType:
    try:
        return from_inference_name(tensor.datatype)
    except KeyError:
        text = tensor.datatype == "BYTES"
        reason = "strings are not served here; send token ids" if text else "no such datatype"
        raise InvalidArgument(f"input {tensor.name!r} has datatype {tensor.datatype!r}: {reason}") from None


def _check_bytes(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise InvalidArgument(f"input byte size mismatch for input {name!r}: expected {expected}, got {got}")


def _typed(tensor: Any, dtype: DataType, elements: int) -> bytes:
    field = _TYPED.get(dtype)
    if field is None:
        raise InvalidArgument(f"input {tensor.name!r} of datatype {tensor.datatype} must come as raw_input_contents")
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise InvalidArgument(
                f"input {tensor.name!r} of datatype {tensor.datatype} takes {field}, not {other.name}"
            )
    given = getattr(tensor.contents, field)
    if len(given) != elements:
        raise InvalidArgument(f"input {tensor.name!r} needs {elements} elements in {field}, got {len(given)}")
    wide = np.array(given, dtype=np.int64) if field in ("int_contents", "uint_contents") else None
    stored = dtype.storage_dtype
    if wide is None:
        return np.array(given, dtype=stored).tobytes()
    limits = np.iinfo(stored)
    if wide.size and (wide.min() < limits.min or wide.max() > limits.max):
        raise InvalidArgument(f"input {tensor.name!r} has a value outside {tensor.datatype}")
    return wide.astype(stored).tobytes()


def _requested(output: Any, request: InferRequest) -> None:
    if "classification" in output.parameters:
        raise InvalidArgument(f"output {output.name!r}: classification is not served here; take the raw output")
    region = _region(output.parameters, f"output {output.name!r}")
    if region is not None:
        request.output_regions[output.name] = region


def _region(parameters: Mapping[str, Any], where: str) -> RegionRef | None:
    """The shared-memory parameters of a tensor; other parameters (binary_data, ...) are not for us."""
    if "shared_memory_region" not in parameters:
        return None
    name = parameters["shared_memory_region"]
    if name.WhichOneof("parameter_choice") != "string_param" or not name.string_param:
        raise InvalidArgument(f"{where}: shared_memory_region must be a string_param that names a region")
    size = _integer(parameters, "shared_memory_byte_size", 2**63 - 1, where)
    if size is None:
        raise InvalidArgument(f"{where}: shared_memory_byte_size must be given with shared_memory_region")
    return RegionRef(name.string_param, _integer(parameters, "shared_memory_offset", 2**63 - 1, where) or 0, size)


def _integer(parameters: Mapping[str, Any], name: str, limit: int, where: str = "request") -> int | None:
    """A parameter that must be an integer from 0 to ``limit``; None when absent."""
    if name not in parameters:
        return None
    choice = parameters[name].WhichOneof("parameter_choice")
    if choice not in ("int64_param", "uint64_param"):
        raise InvalidArgument(f"{where}: parameter {name} must be an int64_param or a uint64_param")
    value: int = getattr(parameters[name], choice)
    if not 0 <= value <= limit:
        raise InvalidArgument(f"{where}: parameter {name} must be from 0 to {limit}, not {value}")
    return value
