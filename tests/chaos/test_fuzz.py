"""Hostile messages cost nobody anything: no crash, no INTERNAL, flat memory, and the service still answers."""

from __future__ import annotations

import os

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import protos.inference as inference
from coordinator.client import Client
from protos.tensor_parallel.v1 import coordinator_pb2
from tests.benchmarks.cluster import up
from tests.chaos.fuzz import Fuzzer, methods, rounds
from tests.chaos.load import Reference

STRIKES = int(os.environ.get("FUZZ_STRIKES", "3000"))
GROWTH = 48 << 20  # bytes a process may grow while arenas, thread stacks and caches fill


@pytest.fixture(scope="module")
def cluster():
    extra = ["--allow-factory", "tests.chaos.models:deep_mlp", "--load", "chaos=tests.chaos.models:deep_mlp"]
    with up(2, extra=extra) as target:
        yield target


def _resident(pids: list[int]) -> dict[int, int]:
    return {pid: psutil.Process(pid).memory_info().rss for pid in pids}


def _pids(client: Client) -> list[int]:
    health = client.health()
    return [health["coordinator"]["pid"], *(rank["pid"] for rank in health["ranks"])]


@pytest.mark.timeout(300)
def test_every_rpc_of_the_coordinator_survives_hostile_messages(cluster):
    services = [
        coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
        inference.service,
    ]
    targets = methods(services)
    reference = Reference(4)
    with grpc.insecure_channel(cluster) as channel, Client(cluster) as client:
        fuzzer = Fuzzer(channel, seed=1)
        list(rounds(fuzzer, targets, len(targets) * 4))  # fills caches, before memory is read
        pids = _pids(client)
        before = _resident(pids)
        for index, _ in enumerate(rounds(fuzzer, targets, STRIKES)):
            if index % 500 == 0:
                answer = client.forward("chaos", {"x": reference.requests[0]}, timeout=10)
                assert reference.right(0, next(iter(answer.values())))
        assert not fuzzer.bad, "\n".join(fuzzer.bad[:10])
        assert _pids(client) == pids, "a process died and was replaced"
        grown = {pid: after - before[pid] for pid, after in _resident(pids).items()}
        assert max(grown.values()) < GROWTH, grown
        answer = client.forward("chaos", {"x": reference.requests[1]}, timeout=10)
        assert reference.right(1, next(iter(answer.values())))
    assert sum(fuzzer.counts.values()) >= STRIKES


def test_a_tensor_that_claims_more_than_it_holds_is_refused_before_memory_is_taken(cluster):
    with Client(cluster) as client, grpc.insecure_channel(cluster) as channel:
        pids = _pids(client)
        before = _resident(pids)
        call = channel.unary_unary("/tensor_parallel.v1.Coordinator/Forward")
        for shape in ([1 << 40, 128], [-5, 128], [1 << 62, 1 << 62], [0] * 64, [1] * 5000):
            request = coordinator_pb2.ForwardRequest(model="chaos")
            request.inputs.add(name="x", dtype=2, shape=shape, data=np.zeros(128, np.float32).tobytes())
            with pytest.raises(grpc.RpcError) as caught:
                call(request.SerializeToString(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
            assert "x" in caught.value.details()
        assert max(after - before[pid] for pid, after in _resident(pids).items()) < GROWTH
