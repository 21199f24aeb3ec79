"""The life of one real daemon: refusing to start, listening early, health, security, draining, leaving."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.tensor_parallel.v1 import shard_pb2, shard_pb2_grpc
from tests.service import shard_models
from tests.service.daemons import REPOSITORY, Daemons, Shardd, wait_for
from tests.service.shard_client import Rank, Ranks, wire

FACTORIES = ["--allow-factory", "tests.service.shard_models:mlp", "--allow-factory", "tests.service.shard_models:moody"]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A start that is expected to be refused."""
    return subprocess.run(
        [sys.executable, "-m", "shardd", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def refused(result: subprocess.CompletedProcess[str], word: str) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert result.returncode == 2, result
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("shardd: ")
    assert word in lines[0]


@pytest.fixture
def basics(tmp_path: Path) -> list[str]:
    return ["--rank", "0", "--world-size", "1", "--model-root", str(tmp_path), "--device", "cpu"]


def start(tmp_path: Path, arguments: list[str], **options) -> Shardd:
    daemon = Shardd(arguments, port_file=tmp_path / "port", log=tmp_path / "log", **options)
    try:
        daemon.await_address()
    except BaseException:
        daemon.close()
        raise
    return daemon


@pytest.fixture
def one(tmp_path: Path, basics: list[str]) -> Iterator[Shardd]:
    daemon = start(tmp_path, [*basics, *FACTORIES, "--listen", f"unix:{tmp_path}/s"])
    yield daemon
    daemon.close()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--frobnicate"], "--frobnicate"),
        (["--rank", "x"], "--rank"),
        (["--model-root", "/no/such/root"], "/no/such/root"),
        (["--listen", "192.0.2.1:0"], "192.0.2.1"),
        (["--interface", "nosuch0"], "nosuch0"),
        (["--metrics-listen", "192.0.2.1:0"], "192.0.2.1"),
        (["--health-listen", "192.0.2.1:0"], "192.0.2.1"),
        (["--gpu-uuid", "GPU-1"], "GPU-1"),
    ],
)
def test_bad_starts_say_one_line_and_exit_2(basics: list[str], arguments: list[str], word: str) -> None:
    refused(run([*basics, *arguments]), word)


def test_a_missing_gpu(basics: list[str]) -> None:
    refused(run([*basics, "--device", "cuda"], CUDA_VISIBLE_DEVICES=""), "cuda")


def test_bad_variables_exit_2(basics: list[str]) -> None:
    refused(run(basics, SHARDD_THREADS="lots"), "SHARDD_THREADS")
    refused(run(basics, SHARDD_THRAEDS="2"), "SHARDD_THRAEDS")


def test_a_port_in_use(basics: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(run([*basics, "--listen", where]), where)
        refused(run([*basics, "--health-listen", where]), where)
        refused(run([*basics, "--metrics-listen", where]), where)


def test_a_unix_socket_in_use_is_left_to_its_server(one: Shardd, basics: list[str]) -> None:
    refused(run([*basics, "--listen", one.address]), "in use")
    assert Rank(one.address).status().pid == one.pid


def test_mistakes_are_answered_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from shardd.main import main; status = main(['--rank', 'x']); "
        "print(status, sorted(set(sys.modules) & {'torch', 'grpc', 'structlog', 'numpy'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert result.stdout == "2 []\n"


def test_status_answers_before_torch_is_there(tmp_path: Path, basics: list[str]) -> None:
    """The service module may not import torch: that is a second that callers would wait for."""
    code = "import sys, shardd.daemon; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert result.stdout == "False\n"
    daemon = start(tmp_path, [*basics, "--listen", "127.0.0.1:0"])
    try:
        rank = Rank(daemon.address)
        early = rank.status()
        assert (early.state, early.pid) == ("NOPG", daemon.pid)
        assert early.store_address
        assert rank.fence(1).accepted  # waits for torch
        later = rank.status()
        assert (later.store_address, later.incarnation) == (early.store_address, early.incarnation)
        assert later.device == "cpu"
    finally:
        daemon.close()


def test_a_single_rank_serves_and_leaves_cleanly(one: Shardd, tmp_path: Path) -> None:
    with Ranks([one.address]) as ranks:
        ranks.load("mlp", "tests.service.shard_models:mlp")
        assert ranks.form() == ["local"]
        assert ranks.run(probe=shard_pb2.Probe())[0].HasField("done")
        assert ranks.execute("mlp", x=np.zeros((1, 16), np.float32))[0].HasField("execute")
        assert one.stop() == 0
        assert "rank 0 is shutting down" in ranks.channels[0].receive().broken.reason
    told = [line["event"] for line in one.events() if line["event"] != "forward"]  # whose line follows its answer
    assert told[-3:] == ["draining", "generation_ended", "stopped"]
    assert not Path(one.address.removeprefix("unix:")).exists()
    assert not (tmp_path / "port").exists()


def test_every_line_of_the_log_is_json(one: Shardd) -> None:
    rank = Rank(one.address)
    with pytest.raises(grpc.RpcError):
        rank.load("m", "nowhere")
    one.stop()
    lines = one.log().splitlines()
    assert len(lines) == len(one.events())
    assert all({"ts", "level", "event", "logger", "rank"} <= set(line) for line in one.events())


def test_sigterm_while_starting(tmp_path: Path, basics: list[str]) -> None:
    daemon = start(tmp_path, [*basics, "--listen", "127.0.0.1:0"])
    assert daemon.stop() == 0


def test_draining_lets_work_finish_and_refuses_more(one: Shardd) -> None:
    command = shard_pb2.ExecuteModel(
        model="moody", version="1", inputs=[wire("x", np.full((1, 16), shard_models.NAP, np.float32))]
    )
    with Ranks([one.address]) as ranks:
        ranks.load("moody", "tests.service.shard_models:moody")
        ranks.form()
        ranks.send(execute=command)
        wait_for(lambda: ranks[0].status().busy_milliseconds, "the forward to run")
        one.signal(signal.SIGTERM)
        wait_for(lambda: ranks[0].status().draining, "the draining to be shown")
        for call in (
            lambda: ranks[0].load("mlp", "tests.service.shard_models:mlp"),
            lambda: ranks[0].fence(ranks.generation + 1),
        ):
            with pytest.raises(grpc.RpcError) as refusal:
                call()
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in refusal.value.details()
        assert ranks.receive()[0].HasField("execute")
        assert ranks.receive()[0].HasField("broken")
    assert one.wait() == 0


def test_a_second_sigterm_hurries(one: Shardd) -> None:
    command = shard_pb2.ExecuteModel(
        model="moody", version="1", inputs=[wire("x", np.full((1, 16), shard_models.SLEEP, np.float32))]
    )
    with Ranks([one.address]) as ranks:
        ranks.load("moody", "tests.service.shard_models:moody")
        ranks.form()
        ranks.send(execute=command)
        wait_for(lambda: ranks[0].status().busy_milliseconds, "the forward to run")
        one.signal(signal.SIGTERM)
        wait_for(lambda: ranks[0].status().draining, "the draining to be shown")
        one.signal(signal.SIGTERM)
        assert ranks.receive()[0].HasField("broken")
        assert one.wait(15) == 0  # the sleeping forward is left behind


def test_a_forward_that_will_not_let_go_costs_the_process(tmp_path: Path, basics: list[str]) -> None:
    arguments = [*basics, *FACTORIES, "--listen", f"unix:{tmp_path}/s", "--fence-seconds", "0.3"]
    daemon = start(tmp_path, arguments)
    try:
        with Ranks([daemon.address]) as ranks:
            ranks.load("moody", "tests.service.shard_models:moody")
            ranks.form()
            x = np.full((1, 16), shard_models.SLEEP, np.float32)
            ranks.send(execute=shard_pb2.ExecuteModel(model="moody", version="1", inputs=[wire("x", x)]))
            wait_for(lambda: ranks[0].status().busy_milliseconds, "the forward to run")
            with pytest.raises(grpc.RpcError):
                ranks[0].fence(ranks.generation + 1)
        assert daemon.wait() == 70
        assert daemon.events("executor_stuck")
    finally:
        daemon.close()


def check(address: str, name: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status


def test_health_check_and_watch(one: Shardd) -> None:
    def states() -> list[int]:
        return [check(one.address, name) for name in ("liveness", "readiness", "")]

    assert states() == [SERVING, NOT_SERVING, NOT_SERVING]
    with pytest.raises(grpc.RpcError) as unknown:
        check(one.address, "else")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(one.address) as channel, Ranks([one.address]) as ranks:
        request = health_pb2.HealthCheckRequest(service="readiness")
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=30)
        assert next(watch).status == NOT_SERVING
        ranks.form()
        assert next(watch).status == SERVING
        assert states() == [SERVING, SERVING, SERVING]
        ranks[0].fence(ranks.generation + 1)
        assert next(watch).status == NOT_SERVING
        ranks.form()
        assert next(watch).status == SERVING
        one.signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING


def test_many_watchers_hold_no_thread(one: Shardd) -> None:
    def threads() -> int:
        return len(os.listdir(f"/proc/{one.pid}/task"))

    rank = Rank(one.address)
    wait_for(lambda: rank.status().device, "torch")
    with grpc.insecure_channel(one.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        before = threads()
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(100)]
        assert [next(watch).status for watch in watches] == [NOT_SERVING] * 100
        assert threads() <= before + 8
        assert rank.status().pid == one.pid


def test_ports_of_their_own_for_probes_and_metrics(tmp_path: Path, basics: list[str]) -> None:
    (tmp_path / "token").write_text("a-token-for-tests")
    arguments = [*basics, "--listen", "127.0.0.1:0", "--token-file", str(tmp_path / "token")]
    daemon = start(tmp_path, [*arguments, "--health-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"])
    try:
        [line] = daemon.events("listening")
        assert check(line["health"], "liveness") == SERVING
        stranger = Rank(line["health"])
        with pytest.raises(grpc.RpcError) as refusal:
            stranger.status()
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with urllib.request.urlopen(f"http://{line['metrics']}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert 'shardd_state{rank="0",state="NOPG"} 1.0' in text
        assert 'shardd_loads_total{rank="0"} 0.0' in text
        assert "a-token-for-tests" not in daemon.log()
    finally:
        daemon.close()


def test_only_bearers_of_the_token(tmp_path: Path, basics: list[str]) -> None:
    (tmp_path / "token").write_text("a-token-for-tests")
    daemon = start(tmp_path, [*basics, "--listen", "127.0.0.1:0"], env={"SHARDD_TOKEN_FILE": str(tmp_path / "token")})
    try:
        for given in ((), (("authorization", "Bearer wrong"),), (("authorization", "a-token-for-tests"),)):
            rank = Rank(daemon.address, metadata=given)
            for call in (rank.status, lambda r=rank: list(r.load_stream("m", "p")), lambda r=rank: r.export_plan("m")):
                with pytest.raises(grpc.RpcError) as refusal:
                    call()
                assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
            rank.close()
        assert Rank(daemon.address, metadata=(("authorization", "Bearer a-token-for-tests"),)).status()
    finally:
        daemon.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca`` signs ``server`` and ``client``; ``other`` signs ``stranger``."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=30)

    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for authority in ("ca", "other"):
        openssl(
            "req", "-x509", *new, "-subj", f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.pem"
        )
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        ca = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key"]
        names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        openssl("req", "-x509", *new, *ca, *names, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    return directory


def test_mutual_tls(tmp_path: Path, basics: list[str], certificates: Path) -> None:
    def credentials(name: str = "") -> grpc.ChannelCredentials:
        pair = [(certificates / f"{name}{suffix}").read_bytes() for suffix in (".key", ".pem")] if name else [None] * 2
        return grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes(), *pair)

    tls = ["--tls-cert", "server.pem", "--tls-key", "server.key", "--tls-client-ca", "ca.pem"]
    tls = [value if value.startswith("--") else str(certificates / value) for value in tls]
    daemon = start(tmp_path, [*basics, "--listen", "127.0.0.1:0", *tls])
    try:
        assert Rank(daemon.address, credentials=credentials("client")).status().pid == daemon.pid
        for rank in (
            Rank(daemon.address, credentials=credentials()),
            Rank(daemon.address, credentials=credentials("stranger")),
            Rank(daemon.address),
        ):
            with pytest.raises(grpc.RpcError) as refusal:
                rank.stub.Status(shard_pb2.StatusRequest(), timeout=10)
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        daemon.close()


@pytest.mark.parametrize(("level", "form"), [("debug", "json"), ("error", "console")])
def test_no_secret_reaches_the_log(
    tmp_path: Path, basics: list[str], certificates: Path, level: str, form: str
) -> None:
    """Not when it starts, nor when callers are refused, requests fail, or the process crashes."""
    token, key = "only-the-coordinator-knows", (certificates / "server.key").read_text()
    (tmp_path / "token").write_text(token + "\n")
    tls = ["--tls-cert", str(certificates / "server.pem"), "--tls-key", str(certificates / "server.key")]
    broken = ["--allow-factory", "tests.service.shard_models:broken", "--token-file", str(tmp_path / "token")]
    said = ["--log-level", level, "--log-format", form]
    daemon = start(
        tmp_path,
        [*basics, "--listen", "127.0.0.1:0", *tls, *broken, *said],
        env={"PYTHONFAULTHANDLER": "1", "GRPC_VERBOSITY": "debug"},
    )
    try:
        credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
        right, wrong = (
            Rank(daemon.address, metadata=(("authorization", f"Bearer {given}"),), credentials=credentials)
            for given in (token, token[:-1])
        )
        with pytest.raises(grpc.RpcError):
            wrong.status()
        with pytest.raises(grpc.RpcError):
            right.load("broken", "tests.service.shard_models:broken")
        with pytest.raises(grpc.RpcError):
            right.join(1, "no address")
        assert right.status().pid == daemon.pid
        daemon.signal(signal.SIGABRT)
        assert daemon.wait() == -signal.SIGABRT
        log = daemon.log()
        assert "Fatal Python error" in log
        assert token not in log
        assert token[:-1] not in log
        assert not any(line in log for line in key.splitlines() if not line.startswith("-----"))
    finally:
        daemon.close()


def test_a_replaced_certificate_is_shown_to_new_connections(
    tmp_path: Path, basics: list[str], certificates: Path
) -> None:
    """By a certificate manager that renews it, while the daemon runs."""

    def install(name: str) -> None:
        for suffix in (".key", ".pem"):
            (tmp_path / f"new{suffix}").write_bytes((certificates / f"{name}{suffix}").read_bytes())
            os.replace(tmp_path / f"new{suffix}", tmp_path / f"shown{suffix}")

    def reached(authority: str) -> bool:
        trusted = grpc.ssl_channel_credentials((certificates / f"{authority}.pem").read_bytes())
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(daemon.address, trusted, options) as channel:
            stub = shard_pb2_grpc.ShardStub(channel)
            try:
                return stub.Status(shard_pb2.StatusRequest(), timeout=10).pid == daemon.pid
            except grpc.RpcError:
                return False

    install("server")
    tls = ["--tls-cert", str(tmp_path / "shown.pem"), "--tls-key", str(tmp_path / "shown.key")]
    daemon = start(tmp_path, [*basics, "--listen", "127.0.0.1:0", *tls])
    try:
        assert [reached("ca"), reached("other")] == [True, False]
        install("stranger")
        assert [reached("ca"), reached("other")] == [False, True]
        (tmp_path / "shown.pem").unlink()
        assert reached("other")
    finally:
        daemon.close()


def test_a_bad_token_file_is_refused_without_showing_it(tmp_path: Path, basics: list[str]) -> None:
    (tmp_path / "token").write_text("two words\n")
    result = run([*basics, "--token-file", str(tmp_path / "token")])
    refused(result, "--token-file")
    assert "two words" not in result.stderr + result.stdout


def test_systemd_hears_of_ready_watchdog_and_stopping(tmp_path: Path, basics: list[str]) -> None:
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))

        def listen() -> None:
            while not heard or "STOPPING=1" not in heard:
                heard.extend(manager.recv(4096).decode().splitlines())

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
        arguments = [*basics, *FACTORIES, "--listen", f"unix:{tmp_path}/s", "--stuck-seconds", "0.2"]
        daemon = start(tmp_path, arguments, env=environment)
        try:
            wait_for(lambda: "READY=1" in heard, "READY=1")
            wait_for(lambda: heard.count("WATCHDOG=1") >= 2, "the watchdog to be fed")
            with Ranks([daemon.address]) as ranks:
                ranks.load("moody", "tests.service.shard_models:moody")
                ranks.form()
                x = np.full((1, 16), shard_models.SLEEP, np.float32)
                ranks.send(execute=shard_pb2.ExecuteModel(model="moody", version="1", inputs=[wire("x", x)]))
                wait_for(lambda: check(daemon.address, "liveness") == NOT_SERVING, "the stuck executor to be noticed")
                fed = heard.count("WATCHDOG=1")
                began = time.monotonic()
                wait_for(lambda: time.monotonic() > began + 0.5, "several watchdog intervals to pass")
                assert heard.count("WATCHDOG=1") <= fed + 1
                daemon.signal(signal.SIGTERM)
                wait_for(lambda: "STOPPING=1" in heard, "STOPPING=1")
        finally:
            daemon.close()


def test_the_store_is_on_the_advertised_address(tmp_path: Path, basics: list[str]) -> None:
    daemon = start(tmp_path, [*basics, "--listen", "127.0.0.1:0", "--interface", "lo"])
    try:
        assert Rank(daemon.address).status().store_address.startswith("127.0.0.1:")
    finally:
        daemon.close()


def test_two_daemons_share_a_host_id(tmp_path: Path) -> None:
    with Daemons(2, tmp_path, tcp=True) as daemons, Ranks(daemons.addresses) as ranks:
        first, second = ranks.all(Rank.status)
        assert first.host_id == second.host_id
        assert first.incarnation != second.incarnation


def test_hostile_messages_are_refused_and_harm_nothing(one: Shardd) -> None:
    """Random bytes, and random fields, to every method: never INTERNAL, never a crash."""
    chance = random.Random(7)
    methods = shard_pb2.DESCRIPTOR.services_by_name["Shard"].methods
    service = "/tensor_parallel.v1.Shard/"
    with grpc.insecure_channel(one.address) as channel:
        for turn in range(40):
            for method in methods:
                data = chance.randbytes(chance.randrange(1, 60)) if turn % 2 else mangled(method.input_type, chance)
                kind = (
                    "stream" if method.client_streaming else "unary",
                    "stream" if method.server_streaming else "unary",
                )
                call = getattr(channel, "_".join(kind))(service + method.name)
                code = outcome(call, iter([data]) if method.client_streaming else data)
                assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (method.name, data)
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff", timeout=10)
        assert unknown.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert Rank(one.address).status().pid == one.pid
    assert not one.events("internal_error")


def outcome(call, request) -> grpc.StatusCode:
    try:
        answer = call(request, timeout=20)
        if isinstance(answer, grpc.Call):
            list(answer)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def mangled(message_type, chance: random.Random) -> bytes:
    """A message with some of its scalar fields set to something extreme."""
    message = message_factory.GetMessageClass(message_type)()
    for field in message_type.fields:
        if field.message_type is None and not field.is_repeated and chance.random() < 0.7:
            extreme = {
                field.CPPTYPE_STRING: ["", "x" * 5000, "../..", "\0", "[::1]:0"],
                field.CPPTYPE_BOOL: [True, False],
            }.get(field.cpp_type, [0, 1, 2**31 - 1])
            value = chance.choice(extreme)
            setattr(message, field.name, value.encode() if field.type == field.TYPE_BYTES else value)
        elif field.message_type is not None and not field.is_repeated and chance.random() < 0.7:
            getattr(message, field.name).MergeFromString(mangled(field.message_type, chance))
    return message.SerializeToString()
