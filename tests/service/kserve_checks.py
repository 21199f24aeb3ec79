"""Checks by KServe's own Python client, in a process of its own: its messages and tritonclient's cannot share one.

    python tests/service/kserve_checks.py HOST:PORT

Needs `pip install kserve` and a server with the models of the conformance checks.
"""

import asyncio
import logging
import sys

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferOutput, InferRequest

TYPES = {
    "FP64": np.float64,
    "FP32": np.float32,
    "FP16": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def tensor(name, datatype, values, raw):
    made = InferInput(name=name, shape=list(values.shape), datatype=datatype)
    made.set_data_from_numpy(values, binary_data=raw)
    return made


def pair(raw=True):
    left, right = np.arange(16, dtype=np.int32).reshape(1, 16), np.full((1, 16), 7, np.int32)
    return left, right, [tensor("INPUT0", "INT32", left, raw), tensor("INPUT1", "INT32", right, raw)]


def output(response, name):
    return next(value for value in response.outputs if value.name == name).as_numpy()


async def fails(call, code):
    got = grpc.StatusCode.OK
    try:
        await call
    except grpc.RpcError as error:
        got = error.code()
    assert got == code


async def check(target):
    async with InferenceGRPCClient(target, timeout=20) as client:
        assert await client.is_server_live() is True
        assert await client.is_server_ready() is True
        assert await client.is_model_ready("simple") is True
        assert await client.is_model_ready("nobody") is False
        for raw in (True, False):
            left, right, inputs = pair(raw)
            response = await client.infer(InferRequest(model_name="simple", request_id="9", infer_inputs=inputs))
            assert (response.model_name, response.id) == ("simple", "9")
            np.testing.assert_array_equal(output(response, "OUTPUT0"), left + right)
            np.testing.assert_array_equal(output(response, "OUTPUT1"), left - right)
        for datatype, dtype in TYPES.items():
            values = np.random.default_rng(1).integers(0, 2, (3, 5)).astype(dtype)
            inputs = [tensor("x", datatype, values, True)]
            response = await client.infer(InferRequest(model_name=f"identity_{datatype.lower()}", infer_inputs=inputs))
            got = output(response, "output")
            assert (got.dtype, got.tobytes()) == (values.dtype, values.tobytes()), datatype
        wanted = [InferOutput(name="OUTPUT1", shape=[1, 16], datatype="INT32")]
        request = InferRequest(model_name="simple", infer_inputs=pair()[2], request_outputs=wanted)
        assert [value.name for value in (await client.infer(request)).outputs] == ["OUTPUT1"]
        many = [client.infer(InferRequest(model_name="simple", infer_inputs=pair()[2])) for _ in range(16)]
        assert len(await asyncio.gather(*many)) == 16
        unknown = InferRequest(model_name="nobody", infer_inputs=pair()[2])
        await fails(client.infer(unknown), grpc.StatusCode.NOT_FOUND)
        lacking = InferRequest(model_name="simple", infer_inputs=pair()[2][:1])
        await fails(client.infer(lacking), grpc.StatusCode.INVALID_ARGUMENT)
    print("kserve: every check passed")


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # the client logs a traceback for every failed call
    asyncio.run(check(sys.argv[1]))
