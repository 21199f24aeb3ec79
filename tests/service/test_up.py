"""`shardctl up` with the real daemons and the real coordinator: served, killed, stopped, restarted, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner

from coordinator.cli.app import shardctl
from coordinator.client import AsyncClient, Client, RequestError
from coordinator.supervisor.local import LocalCluster
from tests.service.cluster import FACTORIES, ROOT, cluster, events, until

pytestmark = pytest.mark.timeout(150)  # a cluster's start is a second or two, and far more on a busy machine
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)
TYPES = (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "uint16", "uint32", "uint64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
)  # fmt: skip


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("up") / "log"


@pytest.fixture(scope="module")
def running(log):
    allow = {"COORDINATOR_ENABLE_SHARED_MEMORY": "tensor_parallel_"}
    with cluster("--load", f"mlp={FACTORIES[0]}", log=log, variables=allow) as found:
        yield found


@pytest.fixture
def client(running):
    with Client(running.target, retries=True, timeout=40) as found:
        yield found


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    from tests.service.shard_models import mlp

    with torch.no_grad():
        return mlp()[0](torch.from_numpy(X)).numpy()


def serving(client: Client) -> dict:
    def probe():
        with contextlib.suppress(RequestError):
            health = client.health(timeout=2)
            return health if health["serving"] else None

    return until(probe, "the cluster serves")


def test_ready_says_everything_and_the_model_answers(running, client, expected):
    ready = running.ready
    assert ready["pid"] == running.process.pid
    assert [rank["rank"] for rank in ready["ranks"]] == [0, 1]
    assert [model["name"] for model in ready["models"]] == ["mlp"]
    np.testing.assert_allclose(client.forward("mlp", {"x": X})["output"], expected, rtol=1e-5, atol=1e-6)


def test_health_names_the_processes(running, client):
    health = serving(client)
    assert [rank["pid"] for rank in health["ranks"]] == [rank["pid"] for rank in running.ready["ranks"]]
    assert health["coordinator"]["pid"] == running.ready["coordinator"]["pid"]
    assert [(rank["state"], rank["loads"]) for rank in health["ranks"]] == [("READY", 1), ("READY", 1)]
    assert [(model["name"], model["serving"]) for model in health["models"]] == [("mlp", True)]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_element_type_comes_back_bit_for_bit(client, dtype):
    name = np.dtype(dtype).name
    client.load(name, FACTORIES[2], arguments={"dtype": name})
    x = np.array([[0, 1, 2], [3, 1, 0]]).astype(dtype)
    out = client.forward(name, {"x": x})
    assert out["same"].dtype == x.dtype
    assert out["same"].tobytes() == x.tobytes()
    assert out["twice"].tobytes() == x.tobytes() * 2
    client.unload(name)


@pytest.mark.parametrize("streamed", [False, True])
def test_shared_memory_in_and_out(client, expected, streamed):
    with client.shared_memory(4096) as region:
        x, y = region.array(X.shape, X.dtype), region.array(X.shape, np.float32)
        x[:] = X
        out = client.forward("mlp", {"x": x}, into={"output": y}, streamed=streamed)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert np.shares_memory(out["output"], y)
        with pytest.raises(RequestError, match="no array of an open shared region"):
            client.forward("mlp", {"x": x}, into={"output": X})
        with pytest.raises(RequestError, match="left in the region"):
            region.array((4096,), np.int8)
        key = Path("/dev/shm") / region.key
        assert key.stat().st_mode & 0o777 == 0o600
        del out
    assert not key.exists()


def test_shared_memory_for_asyncio(running, expected):
    async def run():
        async with AsyncClient(running.target) as client, client.shared_memory(4096) as region:
            x = region.array(X.shape, X.dtype)
            x[:] = X
            return await client.forward("mlp", {"x": x})

    np.testing.assert_allclose(asyncio.run(run())["output"], expected, rtol=1e-5, atol=1e-6)


def test_shared_memory_outside_the_allowed_names_is_refused(client):
    with pytest.raises(RequestError) as caught, client.shared_memory(64, prefix="elsewhere_"):
        pass
    assert caught.value.code().name == "PERMISSION_DENIED"


def test_torch_goes_in_and_comes_out(client, expected):
    out = client.forward("mlp", {"x": torch.from_numpy(X)})["output"]
    assert isinstance(out, torch.Tensor)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "inputs", "code", "says"),
    [
        ("nope", {"x": X}, "NOT_FOUND", "nope"),
        ("mlp", {"x": X.astype(np.float64)}, "INVALID_ARGUMENT", "float64"),
        ("mlp", {"x": X[:, :3]}, "INVALID_ARGUMENT", "x"),
        ("mlp", {}, "INVALID_ARGUMENT", "x"),
        ("mlp", {"x": X, "y": X}, "INVALID_ARGUMENT", "y"),
    ],
    ids=["unknown model", "wrong type", "wrong shape", "missing input", "extra input"],
)
def test_bad_requests_are_told_and_harm_nobody(client, name, inputs, code, says, expected):
    with pytest.raises(RequestError) as caught:
        client.forward(name, inputs)
    assert caught.value.code().name == code
    assert says in caught.value.details()
    assert "Traceback" not in caught.value.details()
    assert caught.value.request_id
    np.testing.assert_allclose(client.forward("mlp", {"x": X})["output"], expected, rtol=1e-5, atol=1e-6)


class Load(threading.Thread):
    """Forwards one after the other until told to stop, keeping answers and errors."""

    def __init__(self, target: str, retries) -> None:
        super().__init__()
        self.client = Client(target, retries=retries, timeout=50)
        self.stop = threading.Event()
        self.outputs: list[np.ndarray] = []
        self.errors: list[RequestError] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                self.outputs.append(self.client.forward("mlp", {"x": X})["output"])
            except RequestError as error:
                self.errors.append(error)

    def finish(self, more: int = 3) -> None:
        seen = len(self.outputs)
        until(lambda: len(self.outputs) >= seen + more or not self.is_alive(), "answers go on", 50)
        self.stop.set()
        self.join(60)
        self.client.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_callers_with_retries_do_not_notice_a_lost_rank(running, client, log, expected, number):
    before = serving(client)
    victim, survivor = before["ranks"][1], before["ranks"][0]
    load = Load(running.target, retries=True)
    load.start()
    until(lambda: load.outputs, "the first answer")
    os.kill(victim["pid"], number)
    until(lambda: not psutil.pid_exists(victim["pid"]), "the old process goes")
    until(lambda: serving(client)["ranks"][1]["pid"] != victim["pid"], "the new one serves")
    load.finish()
    assert load.errors == []
    for output in load.outputs:
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    after = serving(client)
    assert after["ranks"][0]["pid"] == survivor["pid"]
    assert after["ranks"][0]["loads"] == survivor["loads"]
    assert after["generation"] > before["generation"]
    reported = events(log, "child_exited")[-1]
    assert (reported["child"], reported["pid"], reported["status"]) == ("rank 1", victim["pid"], "SIGKILL")


def test_callers_without_retries_are_told_at_once(running, client):
    pid = serving(client)["ranks"][0]["pid"]
    load = Load(running.target, retries=0)
    load.start()
    until(lambda: load.outputs, "the first answer")
    os.kill(pid, signal.SIGKILL)
    until(lambda: load.errors, "an error", 5)
    load.finish()
    assert {error.code().name for error in load.errors} == {"UNAVAILABLE"}
    assert all(error.retry_after for error in load.errors)


def test_a_killed_coordinator_comes_back_on_its_port_without_a_reload(running, client, expected):
    before = serving(client)
    load = Load(running.target, retries=True)
    load.start()
    until(lambda: load.outputs, "the first answer")
    with client.shared_memory(4096) as region:
        x = region.array(X.shape, X.dtype)
        x[:] = X
        os.kill(before["coordinator"]["pid"], signal.SIGKILL)
        until(lambda: serving(client)["coordinator"]["pid"] != before["coordinator"]["pid"], "the new one serves")
        # It knows nothing of regions registered with the old one; the client tells it again.
        np.testing.assert_allclose(client.forward("mlp", {"x": x})["output"], expected, rtol=1e-5, atol=1e-6)
    load.finish()
    assert load.errors == []
    after = serving(client)
    assert [rank["pid"] for rank in after["ranks"]] == [rank["pid"] for rank in before["ranks"]]
    assert [rank["loads"] for rank in after["ranks"]] == [rank["loads"] for rank in before["ranks"]]
    np.testing.assert_allclose(client.forward("mlp", {"x": X})["output"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_is_left(tmp_path, number):
    temporary = Path(tempfile.mkdtemp(prefix="up-"))  # short: the private sockets' paths have a limit
    with cluster(log=tmp_path / "log", ranks=1, variables={"TMPDIR": str(temporary)}) as running:
        assert [path.name for path in temporary.glob("shardctl-*")] != []
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) >= 3  # daemon, coordinator, guardian
        running.process.send_signal(number)
        code = running.process.wait(60)
        _, alive = psutil.wait_procs(family, 15)
        assert alive == []
    assert code == (0 if number is signal.SIGTERM else -signal.SIGKILL)
    assert [path.name for path in temporary.glob("shardctl-*")] == []
    shutil.rmtree(temporary)


def test_state_survives_everything(tmp_path):
    for load in (["--load", f"mlp={FACTORIES[0]}"], []):
        with cluster("--state-dir", str(tmp_path / "state"), *load, log=tmp_path / "log", ranks=1) as running:
            with Client(running.target) as client:
                assert client.forward("mlp", {"x": X})["output"].shape == (2, 16)


def up(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "coordinator.cli", "up", "--device", "cpu", *arguments]
    return subprocess.run(
        command, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=50, cwd=ROOT, check=False
    )


def messages(result: subprocess.CompletedProcess) -> str:
    """Standard error without the processes' own log lines."""
    return "\n".join(line for line in result.stderr.splitlines() if not line.startswith("{"))


def test_people_are_told_how_to_call_it():
    command = [sys.executable, "-m", "coordinator.cli", "up", "--ranks", "1", "--device", "cpu", "--port", "0"]
    command += ["--allow-factory", FACTORIES[0], "--load", f"mlp={FACTORIES[0]}", "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        shown = []
        for line in process.stdout:
            shown.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=50)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert shown[0].startswith("READY target=127.0.0.1:")
    target = shown[0].partition("=")[2]
    assert any(f"shardctl forward --target {target} mlp --input x=x.npy" in line for line in shown), shown
    assert "Traceback" not in errors


def test_a_port_in_use_is_told_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = up("--ranks", "1", "--allow-factory", FACTORIES[0], "--port", str(port))
    assert result.returncode == 2
    assert result.stderr.startswith(f"shardctl: cannot listen on 127.0.0.1:{port}: Address already in use")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ranks", "1", "--model-root", "/no/such"], "no directory '/no/such'"),
        (["--ranks", "1"], "--model-root DIR is needed"),
        (["--ranks", "1", "--model-root", "/tmp", "--load", "x"], "NAME=PATH"),
        (["--ranks", "1", "--model-root", "/tmp", "--load", "m=no/such"], "no 'no/such' below '/tmp'"),
        (["--ranks", "1", "--model-root", "/tmp", "--load", "m=../etc"], "models are read below '/tmp' only"),
        (["--ranks", "1", "--model-root", "/tmp", "--load", "m=/etc"], "models are read below '/tmp' only"),
        (["--ranks", "1", "--model-root", "/usr", "--load", "m=share"], "no config.json in '/usr/share'"),
        (["--ranks", "1", "--model-root", "/tmp", "--colour"], "--colour"),
        (["--ranks", "1", "--allow-factory", "no colon"], "PACKAGE.MODULE:NAME"),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line_and_exit_code_2(arguments, says):
    result = CliRunner().invoke(shardctl, ["up", "--device", "cpu", *arguments])
    assert result.exit_code == 2, result.output
    what, *how = result.stderr.splitlines()
    assert says in what
    assert [line.endswith("--help` says how") for line in how] == [True], "nothing was started"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cuda", "--model-root", "/tmp"], "no GPU was found"),
        (["--model-root", "/tmp", "--load", "m=no/such"], "no 'no/such' below '/tmp'"),
    ],
)
def test_what_cannot_start_starts_nothing(arguments, says):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    result = up("--ranks", "1", *arguments)
    assert result.returncode == 2, result.stderr
    assert says in messages(result)
    assert result.stderr == messages(result) + "\n"
    assert "Traceback" not in result.stderr


def test_an_unknown_variable_of_a_daemon_stops_the_start():
    arguments = ("--ranks", "1", "--port", "0", "--allow-factory", FACTORIES[0])
    result = up(*arguments, environment={"SHARDD_COLOUR": "red"})
    assert result.returncode == 2
    assert "SHARDD_COLOUR" in messages(result)
    assert "rank 0 did not start: exit code 2" in messages(result)


def test_a_model_that_does_not_load_ends_it_with_its_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    result = up("--ranks", "1", "--port", "0", "--model-root", str(tmp_path), "--load", "m=empty")
    assert result.returncode == 1
    assert "cannot load m=empty: " in messages(result)
    assert "config.json has no model_type" in messages(result)


def test_a_token_and_tls_are_served(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=shardctl", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True, timeout=30)
    (tmp_path / "token").write_text("s3cret\n")
    arguments = ("--token-file", str(tmp_path / "token"), "--server-cert", str(cert), "--server-key", str(key))
    with cluster(*arguments, log=tmp_path / "log", ranks=1) as running:
        with Client(running.target, tls=cert, token="s3cret") as client:
            assert client.health()["serving"]
        with Client(running.target, tls=cert, token="wrong") as client, pytest.raises(RequestError) as caught:
            client.health()
        assert caught.value.code().name == "UNAUTHENTICATED"
        with Client(running.target, token="s3cret") as client, pytest.raises(RequestError):
            client.health(timeout=3)
    assert "s3cret" not in (tmp_path / "log").read_text()


def test_a_node_runs_daemons_without_a_coordinator(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "coordinator.cli", "node", "--json", "--ranks", "1", "--device", "cpu"]
    command += [
        "--listen",
        f"127.0.0.1:{port}",
        "--rank-offset",
        "2",
        "--world-size",
        "3",
        "--model-root",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        import json

        ready = json.loads(process.stdout.readline())
        assert [rank["rank"] for rank in ready["ranks"]] == [2]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    finally:
        process.terminate()
        assert process.wait(40) == 0
        process.stdout.close()


def test_a_local_cluster_that_cannot_start_says_so(tmp_path):
    with (tmp_path / "log").open("wb") as log, pytest.raises(RuntimeError, match="no directory") as caught:
        LocalCluster("--ranks", "1", "--model-root", "/no/such", stderr=log).wait()
    assert caught.value.code == 2
