import numpy as np
import pytest

from coordinator.dtypes import DataType, from_inference_name, from_numpy, from_torch_name
from protos.tensor_parallel.v1 import tensor_pb2


def test_values_are_those_of_the_wire():
    assert {dtype.name: int(dtype) for dtype in DataType} == {
        name: value for name, value in tensor_pb2.DataType.items() if value
    }


@pytest.mark.parametrize("dtype", list(DataType))
def test_names_lead_back(dtype):
    assert from_torch_name(dtype.torch_name) is dtype
    assert from_torch_name(f"torch.{dtype.torch_name}") is dtype
    assert from_inference_name(dtype.inference_name) is dtype
    assert dtype.storage_dtype.itemsize == dtype.size
    if dtype.numpy_dtype is not None:
        assert from_numpy(dtype.numpy_dtype) is dtype


def test_types_that_numpy_lacks_are_known_by_name():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed (the test extra has it)")
    assert from_numpy(np.dtype(ml_dtypes.bfloat16)) is DataType.BFLOAT16
    assert from_numpy(np.dtype(ml_dtypes.float8_e4m3fn)) is DataType.FLOAT8_E4M3FN
    assert DataType.BFLOAT16.numpy_dtype is None


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", "c8"])
def test_what_no_tensor_holds_is_refused(dtype):
    with pytest.raises(KeyError):
        from_numpy(np.dtype(dtype))
