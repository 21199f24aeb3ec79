import re

import numpy as np
import pytest

from coordinator.catalog import ModelVersion
from coordinator.dtypes import DataType, from_numpy
from coordinator.errors import InvalidArgument
from coordinator.types import InferRequest, RegionRef, TensorValue
from coordinator.validation import can_join, check
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2

IDS = tensor_pb2.TensorSpec(name="ids", dtype=int(DataType.INT64), shape=[-1, -1], minimum=0, maximum=99)
MASK = tensor_pb2.TensorSpec(name="mask", dtype=int(DataType.FLOAT32), shape=[-1, 4], optional=True)
OUT = tensor_pb2.TensorSpec(name="y", dtype=int(DataType.FLOAT32), shape=[-1, 8])


def entry(inputs=(IDS, MASK), outputs=(OUT,), **batching):
    made = ModelVersion("m", "1", "p", pb.LoadOptions())
    made.info = pb.ModelInfo(inputs=inputs, outputs=outputs, batching=pb.BatchingOptions(**batching))
    return made


def value(name, array, **changes):
    array = np.ascontiguousarray(array)
    fields = {"name": name, "dtype": from_numpy(array.dtype), "shape": array.shape, "data": array.tobytes()} | changes
    return TensorValue(**fields)


def ids(rows=2, highest=99, **changes):
    return value("ids", np.full((rows, 3), highest, np.int64), **changes)


def mask(rows=2):
    return value("mask", np.ones((rows, 4), np.float32))


def test_a_right_request_is_told_its_rows():
    assert check(InferRequest("m", [ids(5)]), entry()).rows == 5
    assert check(InferRequest("m", [ids(5), mask(5)], outputs=["y"]), entry()).rows == 5
    assert check(InferRequest("m", [ids(5), mask(1)]), entry()).rows == 0  # it broadcasts: nothing to join by


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (InferRequest("m", []), "input 'ids' of model 'm' is missing"),
        (InferRequest("m", [mask()]), "input 'ids' of model 'm' is missing"),
        (InferRequest("m", [ids(), value("idz", np.zeros(1))]), "no input 'idz' (it has ids, mask)"),
        (InferRequest("m", [ids(), ids()]), "input 'ids' is given twice"),
        (InferRequest("m", [value("ids", np.zeros((2, 3), np.int32))]), "input 'ids' is int32, the model takes int64"),
        (InferRequest("m", [value("ids", np.zeros(3, np.int64))]), "1 dimensions [3], the model takes [*, *]"),
        (InferRequest("m", [ids(), value("mask", np.ones((2, 5), np.float32))]), "[2, 5], the model takes [*, 4]"),
        (InferRequest("m", [ids(0)]), "input 'ids' is empty: its shape is [0, 3]"),
        (InferRequest("m", [ids(data=b"123")]), "has 3 bytes, but its shape [2, 3] of int64 takes 48"),
        (InferRequest("m", [ids(data=None)]), "input 'ids' has 0 bytes"),
        (InferRequest("m", [ids(highest=100)]), "input 'ids' has the value 100, the model takes 0 to 99"),
        (InferRequest("m", [ids(highest=-1)]), "input 'ids' has the value -1, the model takes 0 to 99"),
        (InferRequest("m", [ids()], outputs=["z"]), "no output 'z' (it has y)"),
        (InferRequest("m", [ids()], outputs=["y", "y"]), "an output is asked for twice"),
        (InferRequest("m", [ids()], output_regions={"z": RegionRef("r", 0, 4)}), "no output 'z'"),
        (InferRequest("m", [ids(9)]), "a batch of 9 rows is over the 8"),
    ],
)
def test_what_is_wrong_is_named(request_, said):
    with pytest.raises(InvalidArgument, match=re.escape(said)):
        check(request_, entry(max_batch_size=8))


def test_a_shape_of_astronomic_size_costs_nothing():
    with pytest.raises(InvalidArgument, match="has 0 bytes"):
        check(InferRequest("m", [TensorValue("ids", DataType.INT64, (2**62, 2**62), b"")]), entry())


def test_joining_needs_a_free_leading_dimension_everywhere():
    scalar = tensor_pb2.TensorSpec(name="loss", dtype=2, shape=[])
    fixed = tensor_pb2.TensorSpec(name="x", dtype=2, shape=[4, -1])
    assert can_join(entry())
    assert not can_join(entry(outputs=(OUT, scalar)))
    assert not can_join(entry(inputs=(IDS, fixed)))
    assert not can_join(entry(inputs=(), outputs=()))
    assert not can_join(entry(outputs=()))  # not known until it runs
