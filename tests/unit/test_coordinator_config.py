import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.config import ConfigError, parse

ROOT = Path(__file__).resolve().parents[2]
SHARD = ["--shard", "127.0.0.1:1"]


def test_defaults_bind_loopback_and_take_shards_in_order():
    config = parse(["--shard", "127.0.0.1:1,unix:/a", "--shard", "[::1]:2"], {})
    assert config.listen == "127.0.0.1:50051"
    assert config.shards == ("127.0.0.1:1", "unix:/a", "[::1]:2")
    assert (config.heartbeat, config.heartbeat_timeout, config.lease, config.queue_size) == (0.25, 1.0, 3.0, 256)


def test_a_flag_beats_its_variable():
    environment = {"COORDINATOR_QUEUE_SIZE": "7", "COORDINATOR_SHARD": "h:1,h:2", "COORDINATOR_LISTEN": ""}
    assert parse([], environment).queue_size == 7
    config = parse(["--queue-size", "9", *SHARD], environment)
    assert (config.queue_size, config.shards) == (9, ("127.0.0.1:1",))


def test_variables_that_kubernetes_sets_for_a_service_of_our_name_are_not_ours():
    links = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_ADDR")
    assert parse(SHARD, {f"COORDINATOR_{name}": "tcp://10.0.0.1:50051" for name in links}).world_size == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "--shard is required"),
        (["--shard", "nonsense"], {}, "--shard takes host:port"),
        (["--shard", "a:1", "--shard", "a:1"], {}, "--shard names one address twice"),
        ([*SHARD, "--frobnicate"], {}, "--frobnicate"),
        ([*SHARD, "--queue", "3"], {}, "--queue"),  # no abbreviations
        (SHARD, {"COORDINATOR_QUEUE_SIZE": "many"}, "COORDINATOR_QUEUE_SIZE takes an integer"),
        (SHARD, {"COORDINATOR_QUEUE_SIZE": "0"}, "COORDINATOR_QUEUE_SIZE takes a value from 1"),
        (SHARD, {"COORDINATOR_HEARTBEAT_MS": "nan"}, "COORDINATOR_HEARTBEAT_MS takes a value from 10"),
        (SHARD, {"COORDINATOR_QEUE_SIZE": "3"}, "unknown environment variable COORDINATOR_QEUE_SIZE"),
        ([*SHARD, "--load", "name"], {}, "--load takes NAME=PATH"),
        ([*SHARD, "--load", "a=b,a=c"], {}, "--load names one model twice"),
        ([*SHARD, "--tls-cert", "/nowhere"], {}, "--tls-cert names a file that does not exist"),
        ([*SHARD, "--tls-cert", __file__], {}, "--tls-cert and --tls-key go together"),
        ([*SHARD, "--tls-client-ca", __file__], {}, "--tls-client-ca needs --tls-cert"),
        ([*SHARD, "--token-file", __file__], {}, "--token-file must hold one token"),
        ([*SHARD, "--enable-shared-memory", "../x"], {}, "without directories"),
        ([*SHARD, "--log-format", "xml"], {}, "--log-format takes one of"),
    ],
)
def test_what_is_refused_and_what_is_said(arguments, environment, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse(arguments, environment)


def test_tokens_are_never_shown(tmp_path):
    (tmp_path / "token").write_text("hush-hush\n")
    config = parse([*SHARD, "--token-file", f"{tmp_path}/token", "--shard-token-file", f"{tmp_path}/token"], {})
    assert config.token == config.shard_token == "hush-hush"
    assert "hush" not in repr(config)


def test_refusals_are_one_line_and_status_2():
    command = [sys.executable, "-m", "coordinator", "--listen", "here"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr == "coordinator: --listen takes host:port or unix:/path, not 'here'\n"
