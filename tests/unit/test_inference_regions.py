"""Clients' shared memory: confined to a prefix, and harmless however a client treats its region."""

import os
import uuid

import pytest

from coordinator import errors
from coordinator.dtypes import DataType
from coordinator.regions import Regions, put
from coordinator.types import InferRequest, InferResult, RegionRef, TensorValue

PREFIX = "tp-test-"


@pytest.fixture
def segment():
    """A shared memory object of 4096 bytes: its key, and its path."""
    key = f"{PREFIX}{uuid.uuid4().hex}"
    path = f"/dev/shm/{key}"
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 16)
    yield key, path
    if os.path.lexists(path):
        os.unlink(path)


@pytest.fixture
def regions(segment):
    made = Regions(PREFIX)
    made.register("r", "/" + segment[0], 0, 4096)
    return made


def shared(offset, size, shape=None):
    value = TensorValue("x", DataType.UINT8, (size,) if shape is None else shape, None, RegionRef("r", offset, size))
    return InferRequest(model="m", inputs=[value])


def answer(size):
    return InferResult("m", "1", [TensorValue("y", DataType.UINT8, (size,), memoryview(b"z" * size))])


def test_inputs_are_copied_out(regions):
    request = shared(8, 16)
    assert regions.take(request) == {}
    (value,) = request.inputs
    assert (value.region, bytes(value.data)) == (None, bytes(range(8, 24)))


def test_outputs_are_put_where_they_belong(regions, segment):
    request = InferRequest(model="m", inputs=[], output_regions={"y": RegionRef("r", 100, 64)})
    targets = regions.take(request)
    result = answer(10)
    put(result, request, targets)
    (value,) = result.outputs
    assert (value.data, value.region) == (None, RegionRef("r", 100, 10))
    with open(segment[1], "rb") as file:
        assert file.read()[98:112] == bytes((98, 99)) + b"z" * 10 + bytes((110, 111))


def test_a_registered_part_begins_at_its_offset(segment):
    made = Regions(PREFIX)
    made.register("r", segment[0], 100, 50)
    request = shared(5, 4)
    made.take(request)
    assert bytes(request.inputs[0].data) == bytes(range(105, 109))
    with pytest.raises(errors.InvalidArgument, match="outside"):
        made.take(shared(48, 4))


def test_a_region_that_shrinks_fails_its_request_alone(regions, segment):
    os.truncate(segment[1], 10)
    with pytest.raises(errors.InvalidArgument, match="shrunk"):
        regions.take(shared(0, 4096))
    request = InferRequest(model="m", inputs=[], output_regions={"y": RegionRef("r", 0, 64)})
    with pytest.raises(errors.InvalidArgument, match="shrunk"):
        put(answer(64), request, regions.take(request))
    assert os.path.getsize(segment[1]) == 10


def test_a_region_that_is_removed_serves_until_it_is_unregistered(regions, segment):
    os.unlink(segment[1])
    request = shared(0, 4)
    regions.take(request)
    assert bytes(request.inputs[0].data) == bytes(range(4))


def test_a_request_outlives_an_unregister(regions):
    request = InferRequest(model="m", inputs=[], output_regions={"y": RegionRef("r", 0, 64)})
    targets = regions.take(request)
    regions.unregister("r")
    put(answer(64), request, targets)
    with pytest.raises(errors.InvalidArgument, match="Unable to find"):
        regions.take(shared(0, 4))


def test_descriptors_are_closed(segment):
    made = Regions(PREFIX)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        made.register(str(n), segment[0], 0, 4096)
    assert len(os.listdir("/proc/self/fd")) == before + 20
    made.unregister("3")
    made.unregister("")
    assert len(os.listdir("/proc/self/fd")) == before


def test_off_by_default():
    with pytest.raises(errors.FailedPrecondition, match="--enable-shared-memory"):
        Regions(None).register("r", "any", 0, 1)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("other", errors.PermissionDenied),
        (f"{PREFIX}../../etc/passwd", errors.InvalidArgument),
        (f"/{PREFIX}x/y", errors.InvalidArgument),
        (f"//{PREFIX}x", errors.InvalidArgument),
        ("", errors.InvalidArgument),
        (f"{PREFIX}\0x", errors.InvalidArgument),
        ("..", errors.InvalidArgument),
        (f"{PREFIX}nobody-has-made-this", errors.InvalidArgument),
    ],
)
def test_keys_are_confined(key, error):
    with pytest.raises(error):
        Regions(PREFIX).register("r", key, 0, 1)


def test_links_and_other_files_are_not_followed(segment, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 4096)
    os.unlink(segment[1])
    os.symlink(secret, segment[1])
    with pytest.raises(errors.InvalidArgument, match="Unable to open"):
        Regions(PREFIX).register("r", segment[0], 0, 4096)
    os.unlink(segment[1])
    os.mkfifo(segment[1])
    with pytest.raises(errors.InvalidArgument, match="no shared memory object"):
        Regions(PREFIX).register("r", segment[0], 0, 0)


def test_a_region_past_its_object_is_refused(segment):
    with pytest.raises(errors.InvalidArgument, match="fewer"):
        Regions(PREFIX).register("r", segment[0], 4000, 100)


def test_names_are_taken_once(regions, segment):
    with pytest.raises(errors.AlreadyExists):
        regions.register("r", segment[0], 0, 4096)
    with pytest.raises(errors.NotFound):
        regions.unregister("nobody")
    assert regions.listed() == {"r": ("/" + segment[0], RegionRef("r", 0, 4096))}


def test_sizes_must_agree(regions):
    with pytest.raises(errors.InvalidArgument, match="takes 8 bytes"):
        regions.take(shared(0, 16, shape=(8,)))
    request = InferRequest(model="m", inputs=[], output_regions={"y": RegionRef("r", 0, 4)})
    with pytest.raises(errors.InvalidArgument, match="takes 64 bytes"):
        put(answer(64), request, regions.take(request))
