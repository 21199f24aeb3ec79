"""Hostile messages cost nobody anything: no crash, no INTERNAL, flat memory, and the service still answers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from coordinator.client import Client
from coordinator.dtypes import DataType
from protos.tensor_parallel.v1 import coordinator_pb2
from tests.chaos.fuzzing import GROWTH, at_coordinator, at_daemon, resident, served
from tests.chaos.load import Reference
from tests.chaos.models import WIDTH
from tests.chaos.parsers import TARGETS, mutations

STRIKES = int(os.environ.get("FUZZ_STRIKES", "1200"))
pytestmark = pytest.mark.timeout(300)
FORWARD = "/tensor_parallel.v1.Coordinator/Forward"


@pytest.fixture(scope="module")
def cluster():
    with served() as target:
        yield target


@pytest.fixture(scope="module")
def forward(cluster):
    with grpc.insecure_channel(cluster) as channel:
        yield channel.unary_unary(FORWARD)


def test_every_rpc_of_the_coordinator_survives_hostile_messages(cluster):
    siege = at_coordinator(cluster, STRIKES, seed=1)
    assert siege.held, (siege.bad[:10], siege.grown, siege.died, siege.wrong)
    assert sum(siege.counts.values()) >= STRIKES


def test_every_rpc_of_a_daemon_survives_hostile_messages():
    siege = at_daemon(STRIKES // 4, seed=2)
    assert siege.held, (siege.bad[:10], siege.grown, siege.died, siege.wrong)


def test_a_tensor_that_claims_more_than_it_holds_is_refused_before_memory_is_taken(cluster, forward):
    with Client(cluster) as client:
        health = client.health()
        pids = [health["coordinator"]["pid"], *(rank["pid"] for rank in health["ranks"])]
        before = resident(pids)
        for shape in ([1 << 40, 128], [-5, 128], [1 << 62, 1 << 62], [0] * 64, [1] * 5000):
            assert _code(forward, shape, np.zeros(128, np.float32).tobytes()) is grpc.StatusCode.INVALID_ARGUMENT
        assert max(after - before[pid] for pid, after in resident(pids).items()) < GROWTH


DIMENSIONS = some.lists(some.integers(-2, 300) | some.sampled_from([WIDTH, 1 << 31, 1 << 62]), max_size=5)
NAMES = some.just("x") | some.sampled_from(["y", ""]) | some.text(max_size=20)
DTYPES = some.just(int(DataType.FLOAT32)) | some.integers(0, 20)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(name="x", dtype=int(DataType.FLOAT32), shape=(3, WIDTH), size=None)
@given(name=NAMES, dtype=DTYPES, shape=DIMENSIONS | some.tuples(some.integers(1, 4), some.just(WIDTH)),
       size=some.integers(0, 4096) | some.none())  # fmt: skip
def test_a_forward_is_answered_if_and_only_if_it_is_well_formed(forward, name, dtype, shape, size):
    """``size`` None: as many bytes as the shape needs, for an element of four."""
    count = int(np.prod(shape, dtype=object)) if len(shape) else 1
    data = bytes(4 * count) if size is None and 0 <= count <= 4096 else bytes(size or 0)
    good = (
        (name, dtype) == ("x", int(DataType.FLOAT32))
        and len(shape) == 2
        and shape[1] == WIDTH
        and shape[0] >= 1
        and len(data) == 4 * count
    )
    request = coordinator_pb2.ForwardRequest(model="kept")
    request.inputs.add(name=name, dtype=dtype, shape=shape, data=data)
    if good:
        answer = coordinator_pb2.ForwardResponse.FromString(forward(request.SerializeToString(), timeout=10))
        assert list(answer.outputs[0].shape) == list(shape)
        return
    with pytest.raises(grpc.RpcError) as caught:
        forward(request.SerializeToString(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()


def test_the_service_answers_as_ever(cluster):
    reference = Reference(2)
    with Client(cluster) as client:
        answer = client.forward("kept", {"x": reference.requests[1]}, timeout=10)
    assert reference.right(1, next(iter(answer.values())))


def _code(forward, shape, data: bytes) -> grpc.StatusCode:
    request = coordinator_pb2.ForwardRequest(model="kept")
    request.inputs.add(name="x", dtype=int(DataType.FLOAT32), shape=shape, data=data)
    with pytest.raises(grpc.RpcError) as caught:
        forward(request.SerializeToString(), timeout=10)
    assert "x" in caught.value.details()
    return caught.value.code()


@pytest.mark.parametrize("name", TARGETS)
def test_every_parser_reads_a_strangers_bytes_or_says_no_as_promised(name):
    target = TARGETS[name]()
    for seed in target.seeds:
        target.read(seed)
    for data in mutations(target.seeds, 3000):
        target(data)


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (pip install atheris)"
)
@pytest.mark.parametrize("name", TARGETS)
def test_every_parser_fuzzed_by_coverage(name, tmp_path):
    command = [sys.executable, "-m", "tests.chaos.parsers", name, "-runs=20000", "-seed=1", "-max_len=4096"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    shown = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert "Done 20000 runs" in shown.stderr
