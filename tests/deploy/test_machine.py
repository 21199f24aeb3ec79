"""The units on a real systemd: start, a killed daemon, a frozen one, a killed coordinator, a wrong setting, stop.

One machine for all of them, in this order. The seconds that each took are printed (``-rP``) and never decide.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.client import Client
from tests.deploy import installed, machine
from tests.deploy.machine import Machine
from tests.deploy.model import FILE, NAME, Model
from tests.deploy.waiting import served, until

pytestmark = pytest.mark.timeout(120)
TARGET = "tensor-parallel.target"
DAEMONS = ("shardd@0.service", "shardd@1.service")


class Service:
    """The installed service on its machine, with a client."""

    def __init__(self, host: Machine, model: Model) -> None:
        self.host, self.model = host, model
        self.client = Client(host.reach(50051).target)

    def served(self) -> float:
        return served(self.client, self.model)

    def pids(self) -> dict[str, int]:
        return {unit: self.host.main_pid(unit) for unit in (*DAEMONS, "coordinator.service")}

    def restarts(self, unit: str) -> int:
        return int(self.host.show(unit, "NRestarts")["NRestarts"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    machine.skip_unless_possible()
    model = Model(tmp_path_factory.mktemp("model"))
    made = next(tmp_path_factory.getbasetemp().glob(f"model*/{FILE}"))

    def prepare(root: Path) -> None:
        installed.install(root, "--cpu", "--ranks", "2")
        models = root / "var/lib/tensor-parallel/models"
        models.mkdir(parents=True)
        (models / FILE).write_bytes(made.read_bytes())
        with (root / "etc/tensor-parallel/tensor-parallel.env").open("a", encoding="utf-8") as settings:
            settings.write(f"COORDINATOR_LOAD={NAME}={FILE}\n")

    with Machine(tmp_path_factory.mktemp("machine"), prepare, installed.bindings()) as host:
        yield Service(host, model)


def test_start_to_first_answer(service: Service) -> None:
    begun = time.monotonic()
    service.host.systemctl("start", TARGET)
    service.served()
    print(f"systemctl start to first answer: {time.monotonic() - begun:.1f} s (promised: 15)")
    assert service.client.health()["serving"]
    for unit in (*DAEMONS, "coordinator.service"):
        shown = service.host.show(unit, "ActiveState", "SubState", "NRestarts", "User")
        assert shown == {"ActiveState": "active", "SubState": "running", "NRestarts": "0", "User": "tensor-parallel"}
    # Confined as they are, coordinator and daemons still share memory.
    assert _events(service, "coordinator.service", "generation_ready")[-1]["channels"] == ["local", "local"]
    assert _events(service, "coordinator.service", "join")[-1]["backend"] == "shm"


def _events(service: Service, unit: str, name: str) -> list[dict]:
    lines = service.host.journal(f"--unit={unit}").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [event for event in events if event["event"] == name]


def test_a_killed_daemon_comes_back_alone(service: Service) -> None:
    service.served()
    before = service.pids()
    begun = time.monotonic()
    service.host.kill(before["shardd@1.service"], signal.SIGKILL)
    until(lambda: service.restarts("shardd@1.service") == 1, "systemd to restart the daemon")
    service.served()
    print(f"SIGKILL of a daemon to serving again: {time.monotonic() - begun:.1f} s (promised: 5)")
    after = service.pids()
    assert {unit for unit in after if after[unit] != before[unit]} == {"shardd@1.service"}


def test_a_frozen_daemon_is_replaced_by_the_watchdog(service: Service) -> None:
    service.served()
    before = service.pids()
    begun = time.monotonic()
    service.host.kill(before["shardd@0.service"], signal.SIGSTOP)
    until(lambda: service.restarts("shardd@0.service") == 1, "the watchdog")
    service.served()
    print(f"SIGSTOP of a daemon to serving again: {time.monotonic() - begun:.1f} s")
    assert "Watchdog timeout" in service.host.journal("--unit=shardd@0.service")
    assert service.pids()["shardd@1.service"] == before["shardd@1.service"]


def test_a_killed_coordinator_finds_its_daemons_loaded(service: Service) -> None:
    service.served()
    before = service.pids()
    loads = [rank["loads"] for rank in service.client.health()["ranks"]]
    begun = time.monotonic()
    service.host.kill(before["coordinator.service"], signal.SIGKILL)
    until(lambda: service.restarts("coordinator.service") == 1, "systemd to restart the coordinator")
    service.served()
    print(f"SIGKILL of the coordinator to serving again: {time.monotonic() - begun:.1f} s")
    after = service.pids()
    assert {unit for unit in after if after[unit] != before[unit]} == {"coordinator.service"}
    assert [rank["loads"] for rank in service.client.health()["ranks"]] == loads


def test_a_wrong_setting_is_shown_and_not_retried(service: Service) -> None:
    own = service.host.root / "etc/tensor-parallel/shardd-1.env"
    text = own.read_text(encoding="utf-8")
    own.write_text(text + "SHARDD_RNAK=1\n", encoding="utf-8")
    service.host.systemctl("restart", "shardd@1.service", check=False)
    shown = service.host.show("shardd@1.service", "ActiveState", "ExecMainStatus")
    assert shown == {"ActiveState": "failed", "ExecMainStatus": "2"}
    assert "SHARDD_RNAK" in service.host.journal("--unit=shardd@1.service", "--lines=20")
    own.write_text(text, encoding="utf-8")
    service.host.systemctl("start", "shardd@1.service")
    service.served()


def test_stop_leaves_nothing(service: Service) -> None:
    begun = time.monotonic()
    service.host.systemctl("stop", TARGET)
    until(lambda: set(service.pids().values()) == {0}, "every unit to stop")
    print(f"systemctl stop: {time.monotonic() - begun:.1f} s")
    left = ("ps", "--no-headers", "-u", "tensor-parallel", "-o", "args")
    # systemd itself runs commands as this user while it clears up after a unit.
    until(lambda: service.host.run(*left, check=False) == "", "the last process of the user to end")
    assert service.host.run("find", "/run/tensor-parallel", "-mindepth", "1") == ""
    assert service.host.run("find", "/dev/shm", "-mindepth", "1") == ""
    assert service.host.systemctl("list-units", "--failed", "--plain", "--no-legend", "shardd*", "coordinator*") == ""
