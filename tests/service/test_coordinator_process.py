"""The process: what stops its start, how it drains, who may talk to it, and what it says of its health."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import coordinator_pb2_grpc
from tests.service import shard_models
from tests.service.clusters import Cluster, CoordinatorProcess, failure, forward_request
from tests.service.daemons import REPOSITORY, wait_for

MLP = "tests.service.shard_models:mlp"
MOODY = "tests.service.shard_models:moody"
X = np.zeros((2, 16), np.float32)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
NOWHERE = ["unix:/nowhere/0", "unix:/nowhere/1"]


def refused(*arguments):
    """stderr of a coordinator that does not start."""
    command = [sys.executable, "-m", "coordinator", "--shard", NOWHERE[0], *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def test_what_stops_the_start_is_said_in_one_line(tmp_path):
    first = CoordinatorProcess(NOWHERE, tmp_path, arguments=["--state-dir", f"{tmp_path}/state"])
    try:
        address = first.await_address()
        assert (
            refused("--listen", address) == f"coordinator: --listen {address} cannot be bound: Address already in use"
        )
        said = refused("--listen", "127.0.0.1:0", "--state-dir", f"{tmp_path}/state")
        assert said == f"coordinator: --state-dir {tmp_path}/state is in use by another coordinator"
        said = refused("--listen", "127.0.0.1:0", "--metrics-listen", address)
        assert said.startswith(f"coordinator: --metrics-listen {address} cannot be bound")
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/desired.json").write_text("{")
        said = refused("--listen", "127.0.0.1:0", "--state-dir", f"{tmp_path}/broken")
        assert "desired.json cannot be read" in said
    finally:
        first.close()


def test_without_ranks_it_answers_and_leaves_when_told(tmp_path):
    process = CoordinatorProcess(NOWHERE, tmp_path)
    try:
        with grpc.insecure_channel(process.await_address()) as channel:
            stub = coordinator_pb2_grpc.CoordinatorStub(channel)
            health = stub.Health(pb.HealthRequest(), timeout=5)
            assert not health.serving
            assert [rank.state for rank in health.ranks] == ["LOST", "LOST"]
            for call in (
                lambda: stub.Forward(forward_request("m", {"x": X}), timeout=5),
                lambda: list(stub.Load(pb.LoadRequest(name="m", path="p"), timeout=5)),
                lambda: stub.Plan(pb.PlanRequest(path="p"), timeout=5),
            ):
                assert failure(call).code() is grpc.StatusCode.UNAVAILABLE
        started = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - started < 10
        assert process.events()[-1]["event"] == "stopped"
    finally:
        process.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    arguments = ["--health-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    with Cluster(2, tmp_path_factory.mktemp("process"), arguments=arguments) as cluster:
        cluster.load("moody", MOODY, kind="factory", batching={"max_joined_rows": 1})
        yield cluster


def listening(cluster):
    return cluster.coordinator.events("listening")[-1]


def check(stub, name):
    return stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status


def test_health_is_served_on_both_ports_by_every_name(cluster):
    for address in (cluster.coordinator.address, listening(cluster)["health"]):
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert [check(stub, name) for name in ("", "coordinator", "moody")] == [SERVING] * 3
            assert failure(lambda stub=stub: check(stub, "nobody")).code() is grpc.StatusCode.NOT_FOUND


def test_an_unknown_service_is_named_as_far_as_a_status_can(cluster):
    with grpc.insecure_channel(cluster.coordinator.address) as channel:
        error = failure(lambda: check(health_pb2_grpc.HealthStub(channel), "n" * 300_000))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "no service 'nnn" in error.details()


def test_the_health_port_serves_nothing_else(cluster):
    with grpc.insecure_channel(listening(cluster)["health"]) as channel:
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        assert failure(lambda: stub.Health(pb.HealthRequest(), timeout=5)).code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_idle_group_runs_collectives_and_stays_serving(cluster):
    before = cluster.daemons[0].pid, cluster.health().generation
    executed = [status_of(rank).executed for rank in cluster.daemons]
    wait_for(
        lambda: all(status_of(r).executed > e + 1 for r, e in zip(cluster.daemons, executed, strict=True)), "probes"
    )
    assert cluster.health().serving
    assert (cluster.daemons[0].pid, cluster.health().generation) == before


def status_of(daemon):
    from protos.tensor_parallel.v1 import shard_pb2, shard_pb2_grpc

    with grpc.insecure_channel(daemon.address) as channel:
        return shard_pb2_grpc.ShardStub(channel).Status(shard_pb2.StatusRequest(), timeout=5)


def test_watch_tells_every_change(cluster):
    seen = []
    with grpc.insecure_channel(cluster.coordinator.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="moody"), timeout=60)
        reader = threading.Thread(target=lambda: collect(call, seen), daemon=True)
        reader.start()
        wait_for(lambda: seen == [SERVING], "the first status")
        cluster.daemons[1].kill()
        wait_for(lambda: seen == [SERVING, NOT_SERVING], "the loss to be told")
        cluster.daemons.restart(1)
        wait_for(lambda: seen == [SERVING, NOT_SERVING, SERVING], "the return to be told")
        call.cancel()
        reader.join(5)


def collect(call, seen):
    with contextlib.suppress(grpc.RpcError):
        for answer in call:
            seen.append(answer.status)


def test_sigterm_finishes_what_was_accepted_and_refuses_what_was_not(cluster):
    """The last test of this cluster: its coordinator is replaced."""
    x = X.copy()
    x[0, 0] = shard_models.NAP
    running = cluster.stub.Forward.future(forward_request("moody", {"x": x}), timeout=20)
    queued = [cluster.stub.Forward.future(forward_request("moody", {"x": X}), timeout=20) for _ in range(5)]
    wait_for(lambda: cluster.health().coordinator.in_flight + cluster.health().coordinator.queue_depth == 6, "work")
    cluster.coordinator.signal(signal.SIGTERM)
    wait_for(lambda: cluster.health().coordinator.state == "DRAINING", "the drain")
    late = failure(lambda: cluster.forward("moody", {"x": X}))
    assert late.code() is grpc.StatusCode.UNAVAILABLE
    assert "draining" in late.details()
    with grpc.insecure_channel(listening(cluster)["health"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert [check(stub, name) for name in ("", "coordinator", "moody")] == [NOT_SERVING] * 3
    for call in [running, *queued]:
        assert call.result(timeout=20).outputs
    assert cluster.coordinator.wait() == 0
    assert not cluster.coordinator.port_file.exists()


def test_a_drain_is_cut_short_at_its_limit(tmp_path):
    with Cluster(2, tmp_path, arguments=["--drain-seconds", "0.2"]) as cluster:
        cluster.load("moody", MOODY, kind="factory")
        x = X.copy()
        x[0, 0] = shard_models.SLEEP
        running = cluster.stub.Forward.future(forward_request("moody", {"x": x}), timeout=40)
        wait_for(lambda: cluster.health().coordinator.in_flight == 1, "the request to run")
        started = time.monotonic()
        assert cluster.coordinator.stop() == 0
        assert time.monotonic() - started < 10
        assert running.exception(timeout=5).code() is grpc.StatusCode.UNAVAILABLE


# ---- TLS and tokens


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """An authority, certificates for a server at localhost, a client and a stranger, and a token."""
    directory = tmp_path_factory.mktemp("pki")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=30)

    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for authority in ("ca", "other"):
        openssl(*new, "-subj", f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.pem")
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        signed = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-addext", "subjectAltName=DNS:localhost"]
        openssl(*new, *signed, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    (directory / "token").write_text("correct-horse\n")
    return directory


def credentials(pki, client=None, authority="ca"):
    pair = [(pki / f"{client}.{kind}").read_bytes() for kind in ("key", "pem")] if client else [None, None]
    return grpc.ssl_channel_credentials((pki / f"{authority}.pem").read_bytes(), *pair)


def ask(address, credential, token=None):
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.secure_channel(address.replace("127.0.0.1", "localhost"), credential) as channel:
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        return stub.Health(pb.HealthRequest(), timeout=5, metadata=metadata)


def secrets(pki):
    """The token, and every line of the keys."""
    keys = [line for key in pki.glob("*.key") for line in key.read_text().splitlines()]
    return ["correct-horse", *(line for line in keys if not line.startswith("-----"))]


def test_mutual_tls_and_the_token_guard_everything_but_health(pki, tmp_path):
    arguments = [
        "--tls-cert",
        f"{pki}/server.pem",
        "--tls-key",
        f"{pki}/server.key",
        "--tls-client-ca",
        f"{pki}/ca.pem",
    ]
    arguments += ["--token-file", f"{pki}/token", "--health-listen", "127.0.0.1:0", "--log-level", "debug"]
    process = CoordinatorProcess(NOWHERE, tmp_path, arguments=arguments)
    try:
        address = process.await_address()
        assert ask(address, credentials(pki, "client"), "correct-horse").coordinator.pid == process.pid
        for credential in (credentials(pki), credentials(pki, "stranger"), credentials(pki, "client", "other")):
            error = failure(lambda c=credential: ask(address, c, "correct-horse"))
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # the handshake fails
        for token in (None, "wrong", "correct-hors"):
            error = failure(lambda t=token: ask(address, credentials(pki, "client"), t))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        wait_for(lambda: process.events("listening"), "the log")
        with grpc.insecure_channel(process.events("listening")[-1]["health"]) as channel:
            assert check(health_pb2_grpc.HealthStub(channel), "coordinator") == SERVING
        with grpc.secure_channel(address.replace("127.0.0.1", "localhost"), credentials(pki, "client")) as channel:
            assert check(health_pb2_grpc.HealthStub(channel), "") == NOT_SERVING
            stream = channel.unary_stream("/tensor_parallel.v1.Coordinator/Load")
            assert failure(lambda: list(stream(b"", timeout=5))).code() is grpc.StatusCode.UNAUTHENTICATED
        assert not [secret for secret in secrets(pki) if secret in process.log()]
    finally:
        process.close()


def test_no_secret_is_in_what_a_crash_leaves(pki, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    tls = ["--tls-cert", f"{pki}/server.pem", "--tls-key", f"{pki}/server.key"]
    arguments = [*tls, "--token-file", f"{pki}/token", "--shard-token-file", f"{pki}/token", "--log-level", "debug"]
    process = CoordinatorProcess(NOWHERE, tmp_path, arguments=arguments)
    try:
        assert ask(process.await_address(), credentials(pki), "correct-horse").coordinator.pid == process.pid
        process.signal(signal.SIGABRT)
        assert process.wait() == -signal.SIGABRT
        assert "Fatal Python error" in process.log()
        assert not [secret for secret in secrets(pki) if secret in process.log()]
    finally:
        process.close()


def test_the_ranks_are_reached_by_mutual_tls_with_a_token(pki, tmp_path):
    server = ["--tls-cert", f"{pki}/server.pem", "--tls-key", f"{pki}/server.key", "--tls-client-ca", f"{pki}/ca.pem"]
    client = ["--shard-tls-ca", f"{pki}/ca.pem", "--shard-tls-cert", f"{pki}/client.pem"]
    client += ["--shard-tls-key", f"{pki}/client.key", "--shard-tls-name", "localhost"]
    token = f"{pki}/token"
    with Cluster(
        2,
        tmp_path,
        arguments=[*client, "--shard-token-file", token],
        daemon_arguments=[*server, "--token-file", token],
    ) as cluster:
        cluster.load("m", MLP, kind="factory")
        assert cluster.forward("m", {"x": X})["output"].shape == (2, 16)
        for process in (cluster.coordinator, *cluster.daemons):
            assert not [secret for secret in secrets(pki) if secret in process.log()]


def test_a_certificate_that_is_none_stops_the_start(pki, tmp_path):
    (tmp_path / "junk.pem").write_text("junk")
    said = refused("--listen", "127.0.0.1:0", "--tls-cert", f"{tmp_path}/junk.pem", "--tls-key", f"{tmp_path}/junk.pem")
    assert "cannot be bound" in said
