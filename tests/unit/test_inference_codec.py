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


def read(data):
    decoded = inference_codec.decode(data)
    got = decoded.request
    inputs = [(value.name, value.dtype, value.shape, bytes(value.data)) for value in got.inputs]
    return got.model, got.version, got.outputs, got.priority, decoded.id, decoded.timeout, inputs


def ask(data, *, model="known", name="x", version="", outputs=(), id="", **parameters):
    message = service_pb2.ModelInferRequest(model_name=model, model_version=version, id=id)
    message.inputs.add(name=name, datatype="UINT8", shape=[len(data)])
    message.raw_input_contents.append(data)
    for output in outputs:
        message.outputs.add(name=output)
    for key, value in parameters.items():
        message.parameters[key].int64_param = value
    return message.SerializeToString()


def test_a_request_like_an_earlier_one_is_read_as_one_that_is_not():
    kinds = [
        {},
        {"model": "other"},
        {"name": "y"},
        {"version": "2"},
        {"outputs": ["z"]},
        {"priority": 7},
        {"timeout": 5_000_000},
        {"id": "i"},
    ]
    for size in (1, 300, 20_000):  # of one byte, of two, and past protobuf's own copy
        for round in range(3):
            for kind in kinds:
                value = np.random.default_rng(round).bytes(size)
                wanted = {"model": "known", "name": "x", "version": "", "outputs": [], "id": ""} | kind
                timeout = kind["timeout"] / 1e6 if "timeout" in kind else None
                inputs = [(wanted["name"], DataType.UINT8, (size,), value)]
                assert read(ask(value, **kind)) == (
                    *(wanted["model"], wanted["version"], wanted["outputs"], kind.get("priority", 0)),
                    *(wanted["id"], timeout, inputs),
                )


def test_what_an_earlier_request_became_does_not_show_in_a_later_one():
    data = ask(b"abcd", outputs=["z"])
    for _ in range(2):
        decoded = inference_codec.decode(data)
        decoded.request.outputs.append("more")
        decoded.request.request_id = "mine"
        decoded.request.inputs[0].shape = (2, 2)
    assert read(data) == ("known", "", ["z"], 0, "", None, [("x", DataType.UINT8, (4,), b"abcd")])
    assert not inference_codec.decode(data).request.request_id


def test_a_request_that_is_cut_short_is_refused_however_well_it_is_known():
    whole, as_long_as_the_rest = ask(b"12345678"), ask(b"abcd")
    for data in (whole, as_long_as_the_rest):
        inference_codec.decode(data)
    with pytest.raises(InvalidArgument, match="no ModelInferRequest"):
        inference_codec.decode(whole[:-4])


@pytest.mark.parametrize("value", [b"ab", b"\x3a\x02", bytes(range(40))])
def test_bytes_of_an_input_that_are_not_the_last_of_a_message_are_found_all_the_same(value):
    for last in (b"cd", b"ef"):
        for tail in (b"\x3a" + bytes([len(value)]) + value, last):
            later = ask(value) + b"\xfa\x07" + bytes([len(tail)]) + tail  # a field that nobody knows
            assert read(later)[-1] == [("x", DataType.UINT8, (len(value),), value)]
        outputs_last = ask(value) + service_pb2.ModelInferRequest(outputs=[{"name": last.decode()}]).SerializeToString()
        assert read(outputs_last)[2] == [last.decode()]
        assert read(outputs_last)[-1] == [("x", DataType.UINT8, (len(value),), value)]
