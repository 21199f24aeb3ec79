"""ModelInfer's bytes against protobuf's own reading of them."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from coordinator import inference_codec
from coordinator.dtypes import DataType
from coordinator.errors import InvalidArgument, Unavailable
from coordinator.types import InferResult, RegionRef, TensorValue

SIZES = {"FP32": 4, "INT64": 8, "UINT8": 1, "BF16": 2}


def request(**fields):
    message = service_pb2.ModelInferRequest(model_name="mlp", **fields)
    message.inputs.add(name="x", datatype="UINT8", shape=[4])
    return message


@st.composite
def requests(draw):
    message = service_pb2.ModelInferRequest(
        model_name=draw(st.text(max_size=8)), model_version=draw(st.text(max_size=3)), id=draw(st.text(max_size=8))
    )
    for n in range(draw(st.integers(0, 4))):
        datatype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        message.inputs.add(name=f"in{n}", datatype=datatype, shape=shape)
        size = int(np.prod(shape, dtype=np.int64)) * SIZES[datatype]
        message.raw_input_contents.append(np.random.default_rng(n).bytes(size))
    for n in range(draw(st.integers(0, 2))):
        message.outputs.add(name=f"out{n}")
    return message


@settings(max_examples=150, deadline=None)
@given(requests(), st.booleans())
def test_any_request_reads_as_protobuf_reads_it(message, large):
    if large:  # past the size from which payloads are lifted out
        message.inputs.add(name="pad", datatype="UINT8", shape=[9000])
        message.raw_input_contents.append(bytes(9000))
    decoded = inference_codec.decode(message.SerializeToString())
    got = decoded.request
    assert (got.model, got.version, decoded.id) == (message.model_name, message.model_version, message.id)
    assert got.outputs == [output.name for output in message.outputs]
    assert [(v.name, v.dtype.inference_name, list(v.shape)) for v in got.inputs] == [
        (t.name, t.datatype, list(t.shape)) for t in message.inputs
    ]
    assert [bytes(value.data) for value in got.inputs] == list(message.raw_input_contents)
    if large:
        assert all(isinstance(value.data, memoryview) for value in got.inputs)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 9000))
def test_any_bytes_are_a_request_or_invalid_argument(data, padding):
    noise = data + service_pb2.ModelInferRequest(raw_input_contents=[bytes(padding)]).SerializeToString()
    with contextlib.suppress(InvalidArgument):  # anything else fails the test
        inference_codec.decode(noise)


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(0, 400), st.integers(1, 255))
def test_a_flipped_byte_is_a_request_or_invalid_argument(message, position, flip):
    data = bytearray(message.SerializeToString() or b"\0")
    data[position % len(data)] ^= flip
    with contextlib.suppress(InvalidArgument):
        inference_codec.decode(bytes(data))


@pytest.mark.parametrize(
    ("name", "choice", "value"),
    [
        ("priority", "int64_param", -1),
        ("priority", "uint64_param", 2**40),
        ("timeout", "uint64_param", 2**63),
        ("timeout", "double_param", 1.5),
    ],
)
def test_parameters_out_of_range_are_refused(name, choice, value):
    message = request(raw_input_contents=[bytes(4)])
    setattr(message.parameters[name], choice, value)
    with pytest.raises(InvalidArgument, match=name):
        inference_codec.decode(message.SerializeToString())


def test_timeout_is_microseconds_and_zero_means_none():
    message = request(raw_input_contents=[bytes(4)])
    assert inference_codec.decode(message.SerializeToString()).timeout is None
    message.parameters["timeout"].int64_param = 0
    assert inference_codec.decode(message.SerializeToString()).timeout is None
    message.parameters["timeout"].int64_param = 1500
    assert inference_codec.decode(message.SerializeToString()).timeout == 0.0015


def test_shared_memory_parameters():
    message = request()
    parameters = message.inputs[0].parameters
    parameters["shared_memory_region"].string_param = "in"
    parameters["shared_memory_byte_size"].int64_param = 4
    parameters["shared_memory_offset"].int64_param = 16
    output = message.outputs.add(name="y").parameters
    output["shared_memory_region"].string_param = "out"
    output["shared_memory_byte_size"].int64_param = 8
    got = inference_codec.decode(message.SerializeToString()).request
    assert (got.inputs[0].region, got.inputs[0].data) == (RegionRef("in", 16, 4), None)
    assert got.output_regions == {"y": RegionRef("out", 0, 8)}


@pytest.mark.parametrize(
    ("name", "choice", "value"),
    [
        ("shared_memory_region", "int64_param", 3),
        ("shared_memory_region", "string_param", ""),
        ("shared_memory_byte_size", "string_param", "4"),
        ("shared_memory_byte_size", "int64_param", -4),
        ("shared_memory_offset", "int64_param", -1),
    ],
)
def test_malformed_shared_memory_parameters_are_refused(name, choice, value):
    message = request()
    parameters = message.inputs[0].parameters
    parameters["shared_memory_region"].string_param = "in"
    parameters["shared_memory_byte_size"].int64_param = 4
    setattr(parameters[name], choice, value)
    with pytest.raises(InvalidArgument, match="shared_memory"):
        inference_codec.decode(message.SerializeToString())


def result():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    return InferResult(
        "mlp",
        "2",
        [
            TensorValue("a", DataType.FLOAT32, (2, 3), memoryview(values)),
            TensorValue("b", DataType.INT8, (4,), None, RegionRef("out", 8, 4)),
            TensorValue("c", DataType.BOOL, (0,), b""),
        ],
    )


def test_answers_keep_outputs_and_raw_contents_in_step():
    answer = service_pb2.ModelInferResponse.FromString(b"".join(inference_codec.encode(result(), "7")))
    assert (answer.model_name, answer.model_version, answer.id) == ("mlp", "2", "7")
    assert [output.datatype for output in answer.outputs] == ["FP32", "INT8", "BOOL"]
    assert list(answer.raw_output_contents) == [np.arange(6, dtype=np.float32).tobytes(), b"", b""]
    assert answer.outputs[1].parameters["shared_memory_region"].string_param == "out"
    assert answer.outputs[1].parameters["shared_memory_byte_size"].int64_param == 4


def test_streamed_answers_and_failures():
    answer = service_pb2.ModelStreamInferResponse.FromString(b"".join(inference_codec.encode_streamed(result(), "7")))
    assert answer.error_message == ""
    assert answer.infer_response.id == "7"
    failure = inference_codec.encode_failure(Unavailable("rank 1 was lost", retry_after_ms=500), "8")
    answer = service_pb2.ModelStreamInferResponse.FromString(failure)
    assert (answer.error_message, answer.infer_response.id) == ("rank 1 was lost", "8")
    assert answer.infer_response.parameters["status"].string_param == "UNAVAILABLE"
    assert answer.infer_response.parameters["retry_after_ms"].int64_param == 500
