"""The systemd units without systemd running: installed below a directory, verified, and their exposure measured."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT

UNITS = ROOT / "deploy" / "systemd"
SYSTEM = Path("/usr/lib/systemd/system")
STARTED = ("tensor-parallel.target", "shardd@0.service", "shardd@1.service", "coordinator.service")

pytestmark = pytest.mark.skipif(
    not shutil.which("systemd-analyze") or not (SYSTEM / "sysinit.target").exists(), reason="systemd is not installed"
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with the distribution's own units and stand-ins for the programs."""
    shutil.copytree(SYSTEM, tmp_path / "usr/lib/systemd/system", symlinks=True)
    for program in ("opt/tensor-parallel/bin/shardd", "opt/tensor-parallel/bin/coordinator", "bin/rm"):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    return tmp_path


def install(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = run(UNITS / "install.sh", "--root", root, *options)
    assert done.returncode == 0, done.stderr
    return done


def settings(root: Path, name: str) -> dict[str, str]:
    lines = (root / "etc/tensor-parallel" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def verify(root: Path, *units: str) -> str:
    done = run("systemd-analyze", "verify", f"--root={root}", "--man=no", *units)
    return done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


def test_units_are_verified_without_a_word(root: Path) -> None:
    install(root, "--cpu", "--ranks", "2")
    assert verify(root, *STARTED) == ""


@pytest.mark.parametrize(
    ("unit", "old", "new"),
    [
        ("shardd@.service", "WatchdogSec=10", "WatchDogSec=10"),
        ("coordinator.service", "Type=notify", "Type=notified"),
        ("coordinator.service", "/opt/tensor-parallel/bin/coordinator", "/opt/tensor-parallel/bin/missing"),
    ],
)
def test_a_faulty_unit_is_not_verified(root: Path, unit: str, old: str, new: str) -> None:
    install(root, "--cpu", "--ranks", "2")
    path = root / "usr/lib/systemd/system" / unit
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert verify(root, *STARTED) != ""


@pytest.mark.parametrize("unit", ["shardd@.service", "coordinator.service"])
def test_exposure_is_small(root: Path, unit: str) -> None:
    install(root, "--cpu", "--ranks", "1")
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", f"--root={root}", "--threshold=20", unit)
    level = re.search(r"exposure level for .*: ([\d.]+)", done.stdout)
    assert level, done.stdout + done.stderr
    assert float(level[1]) <= 2.0, done.stdout
    assert done.returncode == 0
    assert done.stderr == ""


def test_nothing_that_breaks_nccl_is_set() -> None:
    """Each of these takes from a rank its peers' devices, network, shared memory or facts."""
    text = (UNITS / "shardd@.service").read_text(encoding="utf-8")
    keys = {line.split("=")[0] for line in text.splitlines() if "=" in line and not line.startswith("#")}
    assert not keys & {
        "DynamicUser", "PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "PrivateNetwork", "PrivateIPC",
        "PrivateUsers", "ProcSubset", "MemoryDenyWriteExecute", "IPAddressDeny", "NetworkNamespacePath",
    }  # fmt: skip
    coordinator = (UNITS / "coordinator.service").read_text(encoding="utf-8")
    assert not re.search(
        r"^(DynamicUser|PrivateDevices|PrivateNetwork|PrivateIPC|PrivateUsers|ProcSubset)=", coordinator, re.M
    )


def test_newer_systemd_backs_off() -> None:
    """The keys are of systemd 254; in the units themselves, older ones would complain about them."""
    assert "RestartSteps=" in (UNITS / "backoff.conf").read_text(encoding="utf-8")
    assert "RestartSteps=" not in (UNITS / "shardd@.service").read_text(encoding="utf-8")


# ---- install.sh


def test_one_setting_is_cpu_mode(root: Path) -> None:
    install(root, "--cpu", "--ranks", "2")
    on_cpu = (root / "etc/tensor-parallel/tensor-parallel.env").read_text(encoding="utf-8")
    shutil.rmtree(root / "etc/tensor-parallel")
    install(root, "--ranks", "2")
    on_gpus = (root / "etc/tensor-parallel/tensor-parallel.env").read_text(encoding="utf-8")
    changed = [(a, b) for a, b in zip(on_cpu.splitlines(), on_gpus.splitlines(), strict=True) if a != b]
    assert changed == [("SHARDD_DEVICE=cpu", "SHARDD_DEVICE=cuda")]


def test_settings_are_what_the_programs_take(root: Path) -> None:
    from coordinator.config import parse
    from shardd.config import read_config

    install(root, "--cpu", "--ranks", "2")
    common = settings(root, "tensor-parallel.env")
    models = root / "models"
    models.mkdir()
    for rank in range(2):
        variables = common | settings(root, f"shardd-{rank}.env") | {"SHARDD_MODEL_ROOT": str(models)}
        config = read_config([], variables)
        assert (config.rank, config.world_size, config.device) == (rank, 2, "cpu")
    assert parse([], common).shards == tuple(f"unix:/run/tensor-parallel/shardd-{rank}.sock" for rank in range(2))


def test_unit_variables_are_settings(root: Path, tmp_path: Path) -> None:
    from coordinator.config import parse
    from shardd.config import read_config

    def variables(unit: str) -> dict[str, str]:
        text = (UNITS / unit).read_text(encoding="utf-8").replace("%i", "0")
        return dict(
            line.removeprefix("Environment=").split("=", 1)
            for line in text.splitlines()
            if line.startswith("Env") and "File" not in line
        )

    install(root, "--cpu", "--ranks", "1")
    common = settings(root, "tensor-parallel.env") | {"SHARDD_MODEL_ROOT": str(tmp_path)}
    assert read_config([], common | variables("shardd@.service")).listen.path == "/run/tensor-parallel/shardd-0.sock"
    assert parse([], common | variables("coordinator.service")).drain == 20


def test_installing_again_keeps_settings(root: Path) -> None:
    install(root, "--cpu", "--ranks", "2")
    path = root / "etc/tensor-parallel/tensor-parallel.env"
    path.write_text("SHARDD_WORLD_SIZE=7\n", encoding="utf-8")
    assert "kept" in install(root, "--cpu", "--ranks", "2").stdout
    assert path.read_text(encoding="utf-8") == "SHARDD_WORLD_SIZE=7\n"


def test_ranks_on_several_hosts(root: Path) -> None:
    shards = "a:7000,a:7001,b:7000,b:7001"
    several = ("--world-size", "4", "--first-rank", "2", "--listen-base", "0.0.0.0:7000", "--advertise", "10.0.0.2")
    install(root, "--cpu", "--ranks", "2", *several, "--shards", shards)
    assert settings(root, "tensor-parallel.env")["SHARDD_WORLD_SIZE"] == "4"
    assert settings(root, "tensor-parallel.env")["COORDINATOR_SHARD"] == shards
    second = settings(root, "shardd-1.env")
    assert (second["SHARDD_RANK"], second["SHARDD_LISTEN"], second["SHARDD_ADVERTISE"]) == (
        "3",
        "0.0.0.0:7001",
        "10.0.0.2",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cpu",), "--cpu needs --ranks"),
        (("--ranks", "two"), "must be a number"),
        (("--ranks", "2", "--first-rank", "1", "--world-size", "2"), "is less than"),
        (("--ranks", "2", "--world-size", "4"), "--shards must list every daemon"),
        (("--ranks", "2", "--listen-base", "7000"), "must be HOST:PORT"),
        (("--ranks", "2", "--prefix", "/nowhere"), "is missing"),
        (("--rank", "2"), "unknown option"),
    ],
)
def test_wrong_options_are_refused(root: Path, options: tuple[str, ...], message: str) -> None:
    done = run(UNITS / "install.sh", "--root", root, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (root / "etc/tensor-parallel").exists()


def test_uninstall_leaves_nothing(root: Path) -> None:
    before = _files(root)
    install(root, "--cpu", "--ranks", "2")
    assert run(UNITS / "uninstall.sh", "--root", root).returncode == 0
    assert {str(path) for path in _files(root) - before} == {
        f"etc/tensor-parallel/{name}.env" for name in ("tensor-parallel", "shardd-0", "shardd-1")
    }
    assert run(UNITS / "uninstall.sh", "--root", root, "--purge").returncode == 0
    assert _files(root) == before


def _files(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*") if path.is_symlink() or path.is_file()}


def test_scripts_are_clean() -> None:
    for script in ("install.sh", "uninstall.sh"):
        assert (UNITS / script).stat().st_mode & stat.S_IXUSR
        assert run("sh", "-n", UNITS / script).returncode == 0
    if shellcheck := shutil.which("shellcheck"):
        done = run(shellcheck, UNITS / "install.sh", UNITS / "uninstall.sh")
        assert done.returncode == 0, done.stdout
