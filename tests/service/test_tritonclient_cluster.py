"""The conformance checks of the real Triton client against a real cluster, and what only a cluster can show.

Each element type goes through each API bit by bit; one request id is in the logs of every process that the request
touched; the metrics that the dashboard shows are there.
"""

import contextlib
import json
import subprocess
import threading
import urllib.request

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from prometheus_client.parser import text_string_to_metric_families

from coordinator.client import Client
from coordinator.dtypes import from_inference_name
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2
from tests.service.clusters import Cluster
from tests.service.conformance import CHECKS, NUMPY, Env, fails, pair, random_bits, tensor
from tests.service.daemons import wait_for
from tests.service.test_inference_kserve import PYTHON as KSERVE
from tests.service.test_inference_kserve import SCRIPT as KSERVE_CHECKS
from tests.unit.test_metrics_monitoring import LABELS

FACTORIES = "tests.service.inference_models"
PREFIX = "tp-conformance-"


def spec(name, datatype, shape):
    return tensor_pb2.TensorSpec(name=name, dtype=int(from_inference_name(datatype)), shape=shape)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    allowed = [f"--allow-factory={FACTORIES}:{name}" for name in ("simple", "identity", "sleepy")]
    allowed += ["--metrics-listen", "127.0.0.1:0"]
    arguments = ["--metrics-listen", "127.0.0.1:0", "--enable-shared-memory", PREFIX]
    with Cluster(2, tmp_path_factory.mktemp("cluster"), arguments=arguments, daemon_arguments=allowed) as running:
        pair_of = [spec(f"INPUT{n}", "INT32", [-1, 16]) for n in range(2)]
        running.load("simple", f"{FACTORIES}:simple", kind="factory", inputs=pair_of)
        running.load("sleepy", f"{FACTORIES}:sleepy", kind="factory", inputs=[spec("x", "FP32", [-1, 2])])
        for datatype in NUMPY:
            name, inputs = f"identity_{datatype.lower()}", [spec("x", datatype, [-1, -1])]
            running.load(name, f"{FACTORIES}:identity", kind="factory", inputs=inputs)
        yield running


@pytest.fixture
def env(cluster):
    @contextlib.contextmanager
    def held():
        """Every place at the ranks taken for half a second."""
        nap = np.array([[0.5, 0.0]], np.float32)
        sleepers = [threading.Thread(target=cluster.forward, args=("sleepy", {"x": nap * (1 + n)})) for n in range(2)]
        for thread in sleepers:
            thread.start()
        wait_for(lambda: cluster.health().coordinator.in_flight >= 2, "the ranks to be busy")
        yield
        for thread in sleepers:
            thread.join(20)

    made = Env(cluster.coordinator.address, held=held, prefix=PREFIX)
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(env, check):
    check(env)


@pytest.mark.parametrize("datatype", NUMPY)
def test_every_type_comes_back_bit_exact_through_our_own_protocol(cluster, datatype):
    values = random_bits(datatype, (5, 7), 11)
    request = pb.ForwardRequest(model=f"identity_{datatype.lower()}")
    dtype = int(from_inference_name(datatype))
    request.inputs.add(name="x", dtype=dtype, shape=values.shape, data=values.tobytes())
    (output,) = cluster.stub.Forward(request, timeout=20).outputs
    assert (output.dtype, tuple(output.shape), output.data) == (dtype, values.shape, values.tobytes())
    begin = pb.ForwardStreamRequest(begin=request)
    begin.begin.request_id = "streamed"
    answers = list(cluster.stub.ForwardStream(iter([begin]), timeout=20))
    assert answers[-1].last
    assert answers[0].response.outputs[0].data == values.tobytes()


@pytest.mark.parametrize("datatype", NUMPY)
def test_every_type_comes_back_bit_exact_through_our_client(cluster, datatype):
    values = random_bits(datatype, (4, 3), 12)
    with Client(cluster.coordinator.address) as client:
        got = client.forward(f"identity_{datatype.lower()}", {"x": values}, timeout=20)["output"]
    assert (got.dtype, got.shape, got.tobytes()) == (values.dtype, values.shape, values.tobytes())


def test_one_request_id_in_every_process_that_it_touched(cluster, env):
    env.client.infer("simple", pair(), headers={"x-request-id": "follow-me-1"})

    def lines_of(process):
        return [line for line in process.events() if "follow-me-1" in json.dumps(line)]

    wait_for(lambda: lines_of(cluster.coordinator), "the coordinator's line")
    (forward,) = [line for line in lines_of(cluster.coordinator) if line["event"] == "forward"]
    assert (forward["model"], forward["status"], forward["request_id"]) == ("simple", "OK", "follow-me-1")
    assert forward["seconds"] > 0
    for daemon in cluster.daemons:
        wait_for(lambda daemon=daemon: lines_of(daemon), "the rank's line")


def scrape(process):
    listening = process.events("listening")[-1]
    with urllib.request.urlopen(f"http://{listening['metrics']}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def test_metrics_count_what_happened(cluster, env):
    before = scrape(cluster.coordinator)
    values = random_bits("FP32", (100, 100), 1)
    for _ in range(5):
        env.client.infer("identity_fp32", [tensor("x", values)])
    with fails("INVALID_ARGUMENT"):
        env.client.infer("identity_fp32", [tensor("x", values[0])])
    with fails("NOT_FOUND"):
        env.client.infer("made-up", [tensor("x", values)])
    after = scrape(cluster.coordinator)

    def grew(name, **labels):
        key = (name, *sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grew("coordinator_requests_total", model="identity_fp32", code="OK") == 5
    assert grew("coordinator_requests_total", model="identity_fp32", code="INVALID_ARGUMENT") == 1
    assert grew("coordinator_requests_total", model="unknown", code="NOT_FOUND") == 1
    assert grew("coordinator_request_seconds_count", model="identity_fp32") == 6
    assert grew("coordinator_queue_seconds_count", model="identity_fp32") == 5
    assert grew("coordinator_forward_seconds_count", model="identity_fp32") == 5
    assert grew("coordinator_batch_rows_sum", model="identity_fp32") == 500
    assert grew("coordinator_received_bytes_total") >= 5 * values.nbytes
    assert grew("coordinator_sent_bytes_total") >= 5 * values.nbytes
    assert after[("coordinator_serving",)] == 1
    assert after[("coordinator_generation",)] >= 1
    assert after["coordinator_model_serving", ("model", "identity_fp32")] == 1
    assert [after["coordinator_rank_up", ("rank", str(rank))] for rank in range(2)] == [1, 1]
    assert after["coordinator_load_seconds_count", ("code", "OK")] >= 11
    assert (after[("coordinator_queue_depth",)], after[("coordinator_in_flight",)]) == (0, 0)


def test_what_the_dashboard_asks_for_is_exported_by_the_processes(cluster, env):
    """test_metrics_monitoring holds queries against the registries; this holds the registries against the processes."""
    env.client.infer("simple", pair())
    served = {name for process in (cluster.coordinator, *cluster.daemons) for name, *_labels in scrape(process)}
    wanted = {name for name in LABELS if not name.startswith("coordinator_generations")}  # none has ended yet
    assert wanted - served == set()
    for rank, daemon in enumerate(cluster.daemons):
        seen = scrape(daemon)
        assert seen["shardd_state", ("rank", str(rank)), ("state", "READY")] == 1
        assert seen["shardd_forward_seconds_count", ("model", "simple"), ("rank", str(rank))] >= 1


def test_reflection_lists_what_is_served(cluster):
    from tests.service.test_reflection import V1, Curl

    curl = Curl(cluster.coordinator.address, V1)
    try:
        listed = curl.list()
        assert {"tensor_parallel.v1.Coordinator", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(
            listed
        )
        for name in listed:
            curl.describe(name)
        assert curl.call("inference.GRPCInferenceService", "ServerReady", {}) == {"ready": True}
        assert curl.call("tensor_parallel.v1.Coordinator", "Health", {})["serving"] is True
    finally:
        curl.channel.close()


@pytest.mark.skipif(KSERVE is None, reason="kserve is not installed; KSERVE_PYTHON can name a Python that has it")
def test_kserve_client(cluster):
    command = [KSERVE, str(KSERVE_CHECKS), cluster.coordinator.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_lost_rank_is_unavailable_with_a_retry_hint_and_comes_back(cluster, env):
    """Last: it replaces a daemon."""
    cluster.daemons[1].kill()
    cluster.await_not_serving()
    with pytest.raises(grpc.RpcError) as refused:
        env.stub.ModelInfer(_request(), timeout=5)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert int(dict(refused.value.trailing_metadata())["retry-after-ms"]) > 0
    assert env.client.is_server_live() is True
    assert env.client.is_server_ready() is False
    assert env.client.is_model_ready("simple") is False
    assert env.client.get_model_metadata("simple").name == "simple"
    index = {model.name: model for model in env.client.get_model_repository_index().models}
    assert index["simple"].state == "UNAVAILABLE"
    cluster.daemons.restart(1)
    cluster.await_serving()
    assert isinstance(env.client.infer("simple", pair()), triton.InferResult)
    after = scrape(cluster.coordinator)
    assert after["coordinator_generations_total", ("reason", "rank_lost")] >= 1
    assert after[("coordinator_recovery_seconds_count",)] >= 1


def _request():
    from tests.service.conformance import raw_request

    return raw_request()
