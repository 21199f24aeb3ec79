"""What clients of Triton rely on, as checks of values and status codes by the real ``tritonclient.grpc``.

Each check takes an ``Env`` and is run against every server there is: one without ranks, and a real cluster. The models
are Triton's own example ``simple`` (INT32 [-1, 16]: sum and difference) and one identity for each element type.
"""

import asyncio
import contextlib
import queue
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, shared_memory

TIMEOUT = 20.0
CHECKS: list[Callable[["Env"], None]] = []

NUMPY = {
    "FP64": np.float64,
    "FP32": np.float32,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass
class Env:
    """``held`` is a context in which forwards wait; ``prefix`` begins the names of client shared memory."""

    target: str
    held: Callable[[], contextlib.AbstractContextManager[None]] | None = None
    prefix: str = ""
    version: str = "1"

    def __post_init__(self):
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.client = triton.InferenceServerClient(self.target, channel_args=options)
        self.channel = grpc.insecure_channel(self.target, options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def close(self):
        self.client.close()
        self.channel.close()


def check(function):
    CHECKS.append(function)
    return function


@contextlib.contextmanager
def fails(*codes):
    with pytest.raises(InferenceServerException) as caught:
        yield caught
    assert caught.value.status() in {f"StatusCode.{code}" for code in codes}, caught.value
    assert caught.value.message()


@contextlib.contextmanager
def rpc_fails(code):
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    assert caught.value.code().name == code, caught.value
    assert caught.value.details()


def array(rows=1, start=0):
    return np.arange(start, start + rows * 16, dtype=np.int32).reshape(rows, 16)


def tensor(name, values):
    value = triton.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
    value.set_data_from_numpy(values)
    return value


def pair(rows=1):
    return [tensor("INPUT0", array(rows)), tensor("INPUT1", array(rows, 7))]


def is_right(result, rows=1):
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array(rows) + array(rows, 7))
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), array(rows) - array(rows, 7))


def raw_request(**fields):
    request = service_pb2.ModelInferRequest(model_name="simple", **fields)
    for name, start in (("INPUT0", 0), ("INPUT1", 7)):
        request.inputs.add(name=name, datatype="INT32", shape=[1, 16])
        request.raw_input_contents.append(array(1, start).tobytes())
    return request


def infer(env, request):
    return env.stub.ModelInfer(request, timeout=TIMEOUT)


# ---- health and metadata


@check
def server_is_live(env):
    assert env.client.is_server_live(client_timeout=TIMEOUT) is True


@check
def server_is_ready(env):
    assert env.client.is_server_ready(client_timeout=TIMEOUT) is True


@check
def model_is_ready(env):
    assert env.client.is_model_ready("simple") is True
    assert env.client.is_model_ready("simple", env.version) is True


@check
def unknown_model_is_not_ready_and_no_error(env):
    assert env.client.is_model_ready("nobody") is False


@check
def unknown_version_is_not_ready(env):
    assert env.client.is_model_ready("simple", "999") is False


@check
def server_metadata(env):
    metadata = env.client.get_server_metadata()
    assert metadata.name
    assert metadata.version
    assert {"model_repository", "statistics", "system_shared_memory"} <= set(metadata.extensions)


@check
def model_metadata(env):
    metadata = env.client.get_model_metadata("simple")
    assert (metadata.name, list(metadata.versions)) == ("simple", [env.version])
    assert metadata.platform
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("INPUT0", "INT32", [-1, 16]),
        ("INPUT1", "INT32", [-1, 16]),
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("OUTPUT0", "INT32", [-1, 16]),
        ("OUTPUT1", "INT32", [-1, 16]),
    ]


@check
def model_metadata_as_json(env):
    assert env.client.get_model_metadata("simple", as_json=True)["name"] == "simple"


@check
def metadata_of_an_unknown_model(env):
    with fails("NOT_FOUND"):
        env.client.get_model_metadata("nobody")


@check
def metadata_of_an_unknown_version(env):
    with fails("NOT_FOUND"):
        env.client.get_model_metadata("simple", "999")


@check
def model_config(env):
    config = env.client.get_model_config("simple").config
    assert config.name == "simple"
    assert [tensor.name for tensor in config.input] == ["INPUT0", "INPUT1"]
    assert [tensor.name for tensor in config.output] == ["OUTPUT0", "OUTPUT1"]
    assert {tensor.data_type for tensor in config.input} == {8}  # TYPE_INT32
    whole = [16] if config.max_batch_size else [-1, 16]
    assert [list(tensor.dims) for tensor in config.input] == [whole, whole]
    assert config.model_transaction_policy.decoupled is False


@check
def config_of_an_unknown_model(env):
    with fails("NOT_FOUND"):
        env.client.get_model_config("nobody")


# ---- inference


@check
def infer_values(env):
    is_right(env.client.infer("simple", pair(), client_timeout=TIMEOUT))


@check
def infer_any_number_of_rows(env):
    for rows in (1, 2, 5, 17):
        is_right(env.client.infer("simple", pair(rows), client_timeout=TIMEOUT), rows)


@check
def infer_names_the_model_and_echoes_the_id(env):
    response = env.client.infer("simple", pair(), request_id="my id/7").get_response()
    assert (response.model_name, response.model_version, response.id) == ("simple", env.version, "my id/7")


@check
def infer_without_an_id_answers_without_one(env):
    assert env.client.infer("simple", pair()).get_response().id == ""


@check
def outputs_are_raw_and_described(env):
    response = env.client.infer("simple", pair()).get_response()
    assert len(response.raw_output_contents) == len(response.outputs) == 2
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
        ("OUTPUT0", "INT32", [1, 16]),
        ("OUTPUT1", "INT32", [1, 16]),
    ]


@check
def requested_output_alone(env):
    result = env.client.infer("simple", pair(), outputs=[triton.InferRequestedOutput("OUTPUT1")])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), array() - array(1, 7))
    assert result.as_numpy("OUTPUT0") is None


@check
def requested_outputs_in_the_order_asked(env):
    wanted = [triton.InferRequestedOutput(name) for name in ("OUTPUT1", "OUTPUT0")]
    result = env.client.infer("simple", pair(), outputs=wanted)
    is_right(result)
    assert [output.name for output in result.get_response().outputs] == ["OUTPUT1", "OUTPUT0"]


@check
def unknown_output(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", pair(), outputs=[triton.InferRequestedOutput("OUTPUT9")])


@check
def infer_with_a_version(env):
    is_right(env.client.infer("simple", pair(), model_version=env.version))


@check
def infer_with_an_unknown_version(env):
    with fails("NOT_FOUND"):
        env.client.infer("simple", pair(), model_version="999")


@check
def infer_with_an_unknown_model(env):
    with fails("NOT_FOUND") as caught:
        env.client.infer("nobody", pair())
    assert "nobody" in caught.value.message()


@check
def missing_input(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", pair()[:1])


@check
def unexpected_input(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", [*pair(), tensor("INPUT9", array())])


@check
def input_given_twice(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", [pair()[0], pair()[0]])


@check
def no_inputs(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", [])


@check
def wrong_datatype(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", [pair()[0], tensor("INPUT1", array().astype(np.float32))])


@check
def wrong_size(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", [tensor(name, array()[:, :8]) for name in ("INPUT0", "INPUT1")])


@check
def wrong_number_of_dimensions(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", [tensor(name, array()[0]) for name in ("INPUT0", "INPUT1")])


@check
def too_few_bytes(env):
    request = raw_request()
    request.raw_input_contents[0] = request.raw_input_contents[0][:-4]
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def too_many_bytes_in_a_large_request(env):
    request = raw_request()
    request.raw_input_contents[1] += bytes(100_000)
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def negative_size(env):
    request = raw_request()
    request.inputs[0].shape[0] = -1
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def an_enormous_shape_with_few_bytes(env):
    request = raw_request()
    request.inputs[0].shape[0] = 2**62
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def too_few_raw_contents(env):
    request = raw_request()
    del request.raw_input_contents[1]
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def too_many_raw_contents(env):
    request = raw_request()
    request.raw_input_contents.append(b"\0" * 64)
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def strings_are_refused(env):
    words = np.array([[b"word"] * 16], dtype=np.object_)
    with fails("INVALID_ARGUMENT") as caught:
        env.client.infer("simple", [pair()[0], tensor("INPUT1", words)])
    assert "BYTES" in caught.value.message()


@check
def unknown_datatype(env):
    request = raw_request()
    request.inputs[0].datatype = "COMPLEX64"
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def classification_is_refused(env):
    with fails("INVALID_ARGUMENT") as caught:
        env.client.infer("simple", pair(), outputs=[triton.InferRequestedOutput("OUTPUT0", class_count=3)])
    assert "classification" in caught.value.message()


# ---- typed contents


def typed_request():
    request = raw_request()
    del request.raw_input_contents[:]
    request.inputs[0].contents.int_contents.extend(array().ravel().tolist())
    request.inputs[1].contents.int_contents.extend(array(1, 7).ravel().tolist())
    return request


@check
def typed_contents(env):
    response = infer(env, typed_request())
    np.testing.assert_array_equal(
        np.frombuffer(response.raw_output_contents[0], np.int32), (array() + array(1, 7)).ravel()
    )


@check
def typed_contents_of_every_type_that_has_them(env):
    fields = {
        "FP64": ("fp64_contents", [1e-300, -0.1]),
        "FP32": ("fp32_contents", [0.1, -3e38]),
        "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
        "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
        "INT8": ("int_contents", [-128, 127]),
        "UINT8": ("uint_contents", [0, 255]),
        "BOOL": ("bool_contents", [True, False]),
    }
    for datatype, (field, values) in fields.items():
        request = service_pb2.ModelInferRequest(model_name=f"identity_{datatype.lower()}")
        given = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
        getattr(given.contents, field).extend(values)
        raw = infer(env, request).raw_output_contents[0]
        assert raw == np.array(values, NUMPY[datatype]).tobytes(), datatype


@check
def too_few_typed_contents(env):
    request = typed_request()
    request.inputs[0].contents.int_contents.pop()
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def typed_contents_in_the_wrong_field(env):
    request = typed_request()
    request.inputs[0].contents.Clear()
    request.inputs[0].contents.fp32_contents.extend([1.0] * 16)
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def typed_value_out_of_range(env):
    request = service_pb2.ModelInferRequest(model_name="identity_int8")
    request.inputs.add(name="x", datatype="INT8", shape=[1, 1]).contents.int_contents.append(200)
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def half_precision_must_be_raw(env):
    for datatype in ("FP16", "BF16"):
        request = service_pb2.ModelInferRequest(model_name=f"identity_{datatype.lower()}")
        request.inputs.add(name="x", datatype=datatype, shape=[1, 1]).contents.fp32_contents.append(1.0)
        with rpc_fails("INVALID_ARGUMENT"):
            infer(env, request)


@check
def typed_and_raw_contents_at_once(env):
    request = raw_request()
    request.inputs[0].contents.int_contents.extend([1] * 16)
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


# ---- element types


def random_bits(datatype, shape, seed):
    """Every bit pattern may come, NaNs with payloads included; BOOL holds 0 and 1."""
    dtype = np.dtype(NUMPY[datatype])
    bits = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    if datatype == "BOOL":
        bits &= 1
    return bits.view(dtype).reshape(shape)


def round_trip(datatype):
    def bit_exact(env):
        for seed, shape in enumerate([(1, 1), (3, 5), (64, 257)]):
            values = random_bits(datatype, shape, seed)
            result = env.client.infer(f"identity_{datatype.lower()}", [tensor("x", values)])
            got = result.as_numpy("output")
            assert (got.dtype, got.shape) == (values.dtype, values.shape)
            assert got.tobytes() == values.tobytes()

    bit_exact.__name__ = f"{datatype.lower()}_comes_back_bit_exact"
    return bit_exact


for _datatype in NUMPY:
    check(round_trip(_datatype))


@check
def tens_of_megabytes(env):
    values = random_bits("FP32", (4096, 2048), 3)
    got = env.client.infer("identity_fp32", [tensor("x", values)], client_timeout=TIMEOUT).as_numpy("output")
    assert got.tobytes() == values.tobytes()


# ---- request parameters


@check
def timeout_that_is_kept(env):
    is_right(env.client.infer("simple", pair(), timeout=10_000_000))


@check
def timeout_of_the_wrong_type(env):
    request = raw_request()
    request.parameters["timeout"].string_param = "soon"
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def negative_timeout(env):
    with fails("INVALID_ARGUMENT"):
        env.client.infer("simple", pair(), timeout=-5)


@check
def timeout_that_passes(env):
    if env.held is None:
        pytest.skip("this server cannot be made to wait")
    with env.held(), fails("DEADLINE_EXCEEDED"):
        env.client.infer("simple", pair(), timeout=50_000)


@check
def client_timeout_that_passes(env):
    if env.held is None:
        pytest.skip("this server cannot be made to wait")
    with env.held(), fails("DEADLINE_EXCEEDED"):
        env.client.infer("simple", pair(), client_timeout=0.05)


@check
def priority(env):
    is_right(env.client.infer("simple", pair(), priority=1))


@check
def priority_of_the_wrong_type(env):
    request = raw_request()
    request.parameters["priority"].bool_param = True
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def parameters_of_the_client_s_own(env):
    own = {"colour": "red", "count": 3, "flag": True, "ratio": 0.5}
    is_right(env.client.infer("simple", pair(), parameters=own))


@check
def binary_data_is_tolerated(env):
    request = raw_request()
    request.parameters["binary_data_output"].bool_param = True
    request.outputs.add(name="OUTPUT0").parameters["binary_data"].bool_param = True
    assert len(infer(env, request).raw_output_contents) == 1


@check
def sequence_parameters_are_tolerated(env):
    is_right(env.client.infer("simple", pair(), sequence_id=7, sequence_start=True, sequence_end=True))


@check
def compressed_requests(env):
    for algorithm in ("gzip", "deflate"):
        is_right(env.client.infer("simple", pair(200), compression_algorithm=algorithm), 200)


# ---- metadata and errors


@check
def request_id_comes_back_in_trailing_metadata(env):
    _, call = env.stub.ModelInfer.with_call(raw_request(), timeout=TIMEOUT, metadata=(("x-request-id", "abc-123"),))
    assert dict(call.trailing_metadata())["x-request-id"] == "abc-123"


@check
def request_id_is_made_up_where_none_is_given(env):
    _, call = env.stub.ModelInfer.with_call(raw_request(), timeout=TIMEOUT)
    assert uuid.UUID(hex=dict(call.trailing_metadata())["x-request-id"])


@check
def the_messages_own_id_is_the_request_id(env):
    request = raw_request()
    for given, expected in (("job-7/3", "job-7/3"), ("two words", None)):
        request.id = given
        answer, call = env.stub.ModelInfer.with_call(request, timeout=TIMEOUT)
        known = dict(call.trailing_metadata())["x-request-id"]
        assert answer.id == given
        assert known == expected if expected else uuid.UUID(hex=known)
    _, call = env.stub.ModelInfer.with_call(request, timeout=TIMEOUT, metadata=(("x-request-id", "abc-123"),))
    assert dict(call.trailing_metadata())["x-request-id"] == "abc-123"


@check
def failures_carry_error_info(env):
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    request = raw_request()
    request.model_name = "nobody"
    with rpc_fails("NOT_FOUND") as caught:
        env.stub.ModelInfer(request, timeout=TIMEOUT, metadata=(("x-request-id", "abc-124"),))
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "abc-124"
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.metadata["request_id"]) == ("NOT_FOUND", "abc-124")


@check
def bytes_that_are_no_message(env):
    for method in ("ModelInfer", "ModelMetadata", "RepositoryModelLoad"):
        call = env.channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        for junk in (b"\xff\xff\xff", b"\x0a\xff" * 10_000):
            with rpc_fails("INVALID_ARGUMENT"):
                call(junk, timeout=TIMEOUT)


# ---- asynchronous and streaming


@check
def callbacks(env):
    done = queue.Queue()
    for _ in range(8):
        env.client.async_infer("simple", pair(), callback=lambda result, error: done.put((result, error)))
    for _ in range(8):
        result, error = done.get(timeout=TIMEOUT)
        assert error is None
        is_right(result)


@check
def a_failed_callback_has_its_code(env):
    done = queue.Queue()
    env.client.async_infer("nobody", pair(), callback=lambda result, error: done.put((result, error)))
    result, error = done.get(timeout=TIMEOUT)
    assert (result, error.status()) == (None, "StatusCode.NOT_FOUND")


@check
def many_threads_with_one_client(env):
    failures = []

    def work():
        try:
            for _ in range(10):
                is_right(env.client.infer("simple", pair(), client_timeout=TIMEOUT))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


@contextlib.contextmanager
def stream(env, **options):
    """An open stream of a client of its own, and the queue of (result, error) that it answers into."""
    client = triton.InferenceServerClient(env.target)
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=TIMEOUT, **options)
    try:
        yield client, answers
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


@check
def stream_answers_in_order(env):
    with stream(env) as (client, answers):
        for n in range(100):
            client.async_stream_infer("simple", pair(1 + n % 3), request_id=str(n))
        for n in range(100):
            result, error = answers.get(timeout=TIMEOUT)
            assert error is None
            assert result.get_response().id == str(n)
            is_right(result, 1 + n % 3)


@check
def stream_goes_on_after_a_failed_request(env):
    with stream(env) as (client, answers):
        client.async_stream_infer("nobody", pair())
        client.async_stream_infer("simple", pair()[:1])
        client.async_stream_infer("simple", pair())
        _, unknown = answers.get(timeout=TIMEOUT)
        assert "nobody" in unknown.message()
        _, missing = answers.get(timeout=TIMEOUT)
        assert missing.message()
        result, error = answers.get(timeout=TIMEOUT)
        assert error is None
        is_right(result)


@check
def stream_failure_says_which_request_and_why(env):
    bad = raw_request(id="seventh")
    bad.model_name = "nobody"
    (answer,) = env.stub.ModelStreamInfer(iter([bad]), timeout=TIMEOUT)
    assert answer.error_message
    assert answer.infer_response.id == "seventh"
    assert answer.infer_response.parameters["status"].string_param == "NOT_FOUND"


@check
def stream_marks_final_answers(env):
    with stream(env) as (client, answers):
        client.async_stream_infer("simple", pair(), enable_empty_final_response=True)
        result, error = answers.get(timeout=TIMEOUT)
        assert error is None
        is_right(result)
        assert result.get_response().parameters["triton_final_response"].bool_param is True
        assert answers.empty()


@check
def stream_with_strict_errors_ends_with_the_status(env):
    with stream(env, headers={"triton_grpc_error": "true"}) as (client, answers):
        client.async_stream_infer("nobody", pair())
        _, error = answers.get(timeout=TIMEOUT)
        assert error.status() == "StatusCode.NOT_FOUND"


@check
def stream_ends_when_the_client_ends_it(env):
    assert [a.error_message for a in env.stub.ModelStreamInfer(iter([raw_request()] * 3), timeout=TIMEOUT)] == [""] * 3
    assert list(env.stub.ModelStreamInfer(iter([]), timeout=TIMEOUT)) == []


@check
def asyncio_client(env):
    async def run():
        async with triton_aio.InferenceServerClient(env.target) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("nobody") is False
            assert (await client.get_model_metadata("simple")).name == "simple"
            results = await asyncio.gather(*(client.infer("simple", pair(n % 4 + 1)) for n in range(32)))
            for n, result in enumerate(results):
                is_right(result, n % 4 + 1)
            with fails("NOT_FOUND"):
                await client.infer("nobody", pair())

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


@check
def asyncio_stream(env):
    async def requests():
        for n in range(10):
            yield {"model_name": "simple", "inputs": pair(), "request_id": str(n)}
        yield {"model_name": "nobody", "inputs": pair(), "request_id": "10"}

    async def run():
        async with triton_aio.InferenceServerClient(env.target) as client:
            seen = []
            async for result, error in client.stream_infer(requests()):
                seen.append("failed" if error else result.get_response().id)
            assert seen == [*map(str, range(10)), "failed"]

    asyncio.run(asyncio.wait_for(run(), TIMEOUT))


# ---- statistics and repository


@check
def statistics_count_requests(env):
    def counted():
        (stats,) = env.client.get_inference_statistics("simple").model_stats
        return stats

    before = counted()
    for _ in range(3):
        env.client.infer("simple", pair(2))
    after = counted()
    assert (after.name, after.version) == ("simple", env.version)
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.inference_count - before.inference_count == 6
    assert 1 <= after.execution_count - before.execution_count <= 3
    assert after.last_inference >= before.last_inference > 0 or before.last_inference == 0
    assert sum(batch.compute_infer.count for batch in after.batch_stats) == after.execution_count


@check
def statistics_of_all_models(env):
    names = {stats.name for stats in env.client.get_inference_statistics().model_stats}
    assert {"simple", "identity_fp32"} <= names


@check
def statistics_of_an_unknown_model(env):
    with fails("NOT_FOUND"):
        env.client.get_inference_statistics("nobody")


@check
def repository_index(env):
    index = {model.name: model for model in env.client.get_model_repository_index().models}
    assert (index["simple"].state, index["simple"].version, index["simple"].reason) == ("READY", env.version, "")


@check
def unload_and_load_by_name(env):
    env.client.unload_model("identity_bool")
    assert env.client.is_model_ready("identity_bool") is False
    with fails("NOT_FOUND", "UNAVAILABLE"):
        env.client.infer("identity_bool", [tensor("x", np.array([[True]]))])
    ready = env.stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=TIMEOUT)
    assert "identity_bool" not in {model.name for model in ready.models}
    env.client.load_model("identity_bool", client_timeout=TIMEOUT)
    assert env.client.is_model_ready("identity_bool") is True
    assert env.client.infer("identity_bool", [tensor("x", np.array([[True]]))]).as_numpy("output").all()


@check
def unload_of_an_unknown_model(env):
    with fails("NOT_FOUND"):
        env.client.unload_model("nobody")


@check
def load_of_an_unknown_model(env):
    with fails("INVALID_ARGUMENT", "NOT_FOUND"):
        env.client.load_model("nobody", client_timeout=TIMEOUT)


@check
def load_with_files_is_refused(env):
    with fails("INVALID_ARGUMENT"):
        env.client.load_model("simple", config="{}", files={"file:1/model.py": b"import os"})


@check
def load_with_a_bad_configuration(env):
    with fails("INVALID_ARGUMENT"):
        env.client.load_model("simple", config="no json")


# ---- shared memory


@contextlib.contextmanager
def region(env, size, register=True):
    name = f"{env.prefix}{uuid.uuid4().hex[:12]}"
    handle = shared_memory.create_shared_memory_region(name, f"/{name}", size)
    try:
        if register:
            env.client.register_system_shared_memory(name, f"/{name}", size)
        yield name, handle
    finally:
        env.client.unregister_system_shared_memory(name)
        shared_memory.destroy_shared_memory_region(handle)


def shared_inputs(name):
    inputs = [triton.InferInput(f"INPUT{n}", [1, 16], "INT32") for n in range(2)]
    for n, value in enumerate(inputs):
        value.set_shared_memory(name, 64, 64 * n)
    return inputs


@check
def inputs_and_outputs_in_shared_memory(env):
    with region(env, 128) as (source, source_handle), region(env, 256) as (sink, sink_handle):
        shared_memory.set_shared_memory_region(source_handle, [array(), array(1, 7)])
        outputs = [triton.InferRequestedOutput(f"OUTPUT{n}") for n in range(2)]
        for n, output in enumerate(outputs):
            output.set_shared_memory(sink, 128, 128 * n)
        response = env.client.infer("simple", shared_inputs(source), outputs=outputs).get_response()
        assert [len(raw) for raw in response.raw_output_contents] == [0, 0]
        assert [list(output.shape) for output in response.outputs] == [[1, 16], [1, 16]]
        got = [shared_memory.get_contents_as_numpy(sink_handle, np.int32, [1, 16], 128 * n) for n in range(2)]
        np.testing.assert_array_equal(got[0], array() + array(1, 7))
        np.testing.assert_array_equal(got[1], array() - array(1, 7))
        del got


@check
def inputs_in_shared_memory_and_outputs_inline(env):
    with region(env, 128) as (source, handle):
        shared_memory.set_shared_memory_region(handle, [array(), array(1, 7)])
        is_right(env.client.infer("simple", shared_inputs(source)))


@check
def one_input_inline_and_one_shared(env):
    with region(env, 128) as (source, handle):
        shared_memory.set_shared_memory_region(handle, [array(), array(1, 7)])
        is_right(env.client.infer("simple", [shared_inputs(source)[0], pair()[1]]))


@check
def shared_memory_status(env):
    with region(env, 128) as (name, _):
        regions = env.client.get_system_shared_memory_status().regions
        assert (regions[name].name, regions[name].byte_size, regions[name].offset) == (name, 128, 0)
        assert regions[name].key.strip("/") == name
        assert list(env.client.get_system_shared_memory_status(name).regions) == [name]
    assert name not in env.client.get_system_shared_memory_status().regions


@check
def status_of_an_unknown_region(env):
    with fails("NOT_FOUND"):
        env.client.get_system_shared_memory_status("nobody")


@check
def a_region_registered_twice(env):
    with region(env, 128) as (name, _), fails("ALREADY_EXISTS"):
        env.client.register_system_shared_memory(name, f"/{name}", 128)


@check
def a_region_that_does_not_exist(env):
    with fails("INVALID_ARGUMENT", "NOT_FOUND"):
        env.client.register_system_shared_memory("ghost", f"/{env.prefix}ghost-{uuid.uuid4().hex}", 128)


@check
def unregistering_an_unknown_region_is_no_error(env):
    env.client.unregister_system_shared_memory("nobody")


@check
def inputs_in_an_unknown_region(env):
    with fails("INVALID_ARGUMENT", "NOT_FOUND"):
        env.client.infer("simple", shared_inputs("nobody"))


@check
def inputs_past_the_end_of_a_region(env):
    with region(env, 64) as (name, _), fails("INVALID_ARGUMENT"):
        env.client.infer("simple", shared_inputs(name))


@check
def outputs_larger_than_their_part_of_a_region(env):
    with region(env, 64) as (name, _):
        small = triton.InferRequestedOutput("OUTPUT0")
        small.set_shared_memory(name, 32)
        with fails("INVALID_ARGUMENT"):
            env.client.infer("simple", pair(), outputs=[small])


@check
def a_region_without_a_size(env):
    request = raw_request()
    request.inputs[0].parameters["shared_memory_region"].string_param = "any"
    del request.raw_input_contents[0]
    with rpc_fails("INVALID_ARGUMENT"):
        infer(env, request)


@check
def cuda_regions(env):
    assert len(env.client.get_cuda_shared_memory_status().regions) == 0
    with fails("UNIMPLEMENTED"):
        env.client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 64)
    env.client.unregister_cuda_shared_memory()


@check
def settings_that_are_not_served(env):
    with fails("UNIMPLEMENTED"):
        env.client.get_trace_settings()
    with fails("UNIMPLEMENTED"):
        env.client.get_log_settings()
