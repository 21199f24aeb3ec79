"""Flags and variables of shardd: every mistake is refused by name, flags beat variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardd.config import OPTIONS, ConfigError, read_config


@pytest.fixture
def needed(tmp_path: Path) -> list[str]:
    return ["--rank", "1", "--world-size", "2", "--model-root", str(tmp_path)]


def test_defaults(needed: list[str], tmp_path: Path) -> None:
    config = read_config(needed, {})
    assert (config.rank, config.world_size, config.model_root) == (1, 2, tmp_path)
    assert str(config.listen) == "127.0.0.1:0"
    assert (config.device, config.backend, config.token) == ("auto", "auto", "")


def test_a_flag_beats_its_variable(needed: list[str]) -> None:
    environment = {"SHARDD_RANK": "0", "SHARDD_BACKEND": "gloo", "SHARDD_LISTEN": "unix:/tmp/a.sock"}
    config = read_config([*needed, "--backend", "shm"], environment)
    assert (config.rank, config.backend, config.listen.path) == (1, "shm", "/tmp/a.sock")


def test_variables_alone_suffice(tmp_path: Path) -> None:
    environment = {
        "SHARDD_RANK": "3",
        "SHARDD_WORLD_SIZE": "4",
        "SHARDD_MODEL_ROOT": str(tmp_path),
        "SHARDD_ALLOW_FACTORY": "a.b:c, d:e",
        "SHARDD_ALLOW_SHARED_GPU": "yes",
        "SHARDD_DRAIN_SECONDS": "1.5",
        "PATH": "/bin",
    }
    config = read_config([], environment)
    assert (config.rank, config.world_size) == (3, 4)
    assert config.allow_factory == ("a.b:c", "d:e")
    assert config.allow_shared_gpu
    assert config.drain_seconds == 1.5


def test_repeated_and_bare_flags(needed: list[str]) -> None:
    config = read_config([*needed, "--allow-factory", "a:b", "--allow-factory", "c:d", "--allow-shared-gpu"], {})
    assert config.allow_factory == ("a:b", "c:d")
    assert config.allow_shared_gpu


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--rank", "-1"], "--rank"),
        (["--rank", "1.0"], "--rank"),
        (["--rank", "2"], "--world-size 2"),
        (["--world-size", "0"], "--world-size"),
        (["--listen", "localhost"], "--listen"),
        (["--listen", "localhost:70000"], "--listen"),
        (["--listen", "unix:"], "--listen"),
        (["--listen", "unix:/" + "x" * 120], "--listen"),
        (["--port-file", "/no/such/directory/p"], "--port-file"),
        (["--device", "gpu"], "--device"),
        (["--device", "cuda:x"], "--device"),
        (["--model-root", "/no/such/directory"], "does not exist"),
        (["--model-root", __file__], "is not a directory"),
        (["--backend", "mpi"], "gloo"),
        (["--backend", "nccl", "--device", "cpu"], "needs a GPU"),
        (["--backend", "shm", "--device", "cuda"], "for the CPU"),
        (["--allow-factory", "os.system"], "PACKAGE.MODULE:NAME"),
        (["--threads", "many"], "--threads"),
        (["--drain-seconds", "nan"], "--drain-seconds"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--tls-cert", "/no/such/file"], "cannot be read"),
        (["--tls-cert", __file__], "go together"),
        (["--tls-client-ca", __file__], "needs --tls-cert"),
        (["--token-file", "/dev/null"], "one token"),
        (["--metrics-listen", "unix:/tmp/m"], "HOST:PORT"),
        (["--max-message-bytes", "0"], "--max-message-bytes"),
        (["--log-level", "loud"], "--log-level"),
        (["--frobnicate", "1"], "--frobnicate"),
        (["--mod", "/tmp"], "--mod"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_named(needed: list[str], flags: list[str], names: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_config([*needed, *flags], {})
    message = str(refused.value)
    assert names in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SHARDD_RANK", "one"), ("SHARDD_RNAK", "1"), ("SHARDD_DEVICE", "tpu"), ("SHARDD_ALLOW_SHARED_GPU", "maybe")],
)
def test_bad_variables_are_named(tmp_path: Path, variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        read_config(["--world-size", "2", "--model-root", str(tmp_path)], {variable: value})


@pytest.mark.parametrize("missing", ["--rank", "--world-size", "--model-root"])
def test_what_is_required(needed: list[str], missing: str) -> None:
    at = needed.index(missing)
    with pytest.raises(ConfigError, match=f"{missing} is required"):
        read_config(needed[:at] + needed[at + 2 :], {})


def test_the_token_is_read_and_never_shown(needed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("correct-horse\n")
    config = read_config([*needed, "--token-file", str(path)], {})
    assert config.token == "correct-horse"
    assert "correct-horse" not in repr(config)


def test_help_names_every_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read_config(["--help"], {})
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(option.flag in shown and option.variable in shown for option in OPTIONS)
