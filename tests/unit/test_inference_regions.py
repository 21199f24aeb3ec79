"""Clients' shared memory: confined to a prefix, and harmless however a client treats its region."""

import os
import uuid

import pytest

from coordinator import errors
from coordinator.regions import Regions
from coordinator.types import RegionRef

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
    yield made
    made.unregister("")


def test_bytes_are_copied_out_and_in(regions, segment):
    assert bytes(regions.read(RegionRef("r", 8, 16))) == bytes(range(8, 24))
    regions.write(RegionRef("r", 100, 64), b"z" * 10)
    with open(segment[1], "rb") as file:
        assert file.read()[98:112] == bytes((98, 99)) + b"z" * 10 + bytes((110, 111))


def test_a_registered_part_begins_at_its_offset(segment):
    made = Regions(PREFIX)
    made.register("r", segment[0], 100, 50)
    assert bytes(made.read(RegionRef("r", 5, 4))) == bytes(range(105, 109))
    for outside in (RegionRef("r", 48, 4), RegionRef("r", 0, 51), RegionRef("r", 2**62, 4)):
        with pytest.raises(errors.InvalidArgument, match="outside"):
            made.read(outside)
    made.unregister("")


def test_a_region_that_shrinks_fails_its_request_alone(regions, segment):
    os.truncate(segment[1], 10)
    with pytest.raises(errors.InvalidArgument, match="shrunk"):
        regions.read(RegionRef("r", 0, 4096))
    with pytest.raises(errors.InvalidArgument, match="shrunk"):
        regions.write(RegionRef("r", 0, 64), b"z" * 64)
    assert os.path.getsize(segment[1]) == 10


def test_a_region_that_is_removed_serves_until_it_is_unregistered(regions, segment):
    os.unlink(segment[1])
    assert bytes(regions.read(RegionRef("r", 0, 4))) == bytes(range(4))
    regions.unregister("r")
    with pytest.raises(errors.InvalidArgument, match="not registered"):
        regions.read(RegionRef("r", 0, 4))


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
        (f"{PREFIX}../../etc/passwd", errors.PermissionDenied),
        (f"/{PREFIX}x/y", errors.PermissionDenied),
        (f"//{PREFIX}x", errors.PermissionDenied),
        ("", errors.PermissionDenied),
        (f"{PREFIX}\0x", errors.PermissionDenied),
        ("..", errors.PermissionDenied),
        (f"{PREFIX}nobody-has-made-this", errors.NotFound),
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
    with pytest.raises(errors.InvalidArgument, match="cannot be opened"):
        Regions(PREFIX).register("r", segment[0], 0, 4096)
    os.unlink(segment[1])
    os.mkfifo(segment[1])
    with pytest.raises(errors.InvalidArgument, match="needed"):
        Regions(PREFIX).register("r", segment[0], 0, 1)


def test_a_region_past_its_object_is_refused(segment):
    with pytest.raises(errors.InvalidArgument, match="needed"):
        Regions(PREFIX).register("r", segment[0], 4000, 100)


def test_names_are_taken_once(regions, segment):
    with pytest.raises(errors.AlreadyExists):
        regions.register("r", segment[0], 0, 4096)
    assert regions.list() == {"r": ("/" + segment[0], RegionRef("r", 0, 4096))}


def test_an_output_must_fit(regions):
    with pytest.raises(errors.InvalidArgument, match="64 bytes does not fit"):
        regions.write(RegionRef("r", 0, 4), b"z" * 64)
