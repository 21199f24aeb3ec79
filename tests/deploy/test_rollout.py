"""A rolling update of the coordinator's Deployment under load: clients with retries lose no request.

As Kubernetes does it (maxSurge 1, maxUnavailable 1): the new pod starts and stands by; after its preStop pause the old
one gets SIGTERM, drains, and gives its ranks back; the new one takes them, is ready, and gets new connections.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.client import Client
from tests.deploy.hosts import Relay
from tests.deploy.manifests import find, render, settings
from tests.deploy.model import FILE, NAME, Model
from tests.deploy.waiting import served, until
from tests.service.daemons import DaemonProcess, Daemons

pytestmark = pytest.mark.timeout(150)
CLIENTS = 4


class Coordinator:
    """With the settings of the manifest."""

    def __init__(self, directory: Path, name: str, shards: list[str]) -> None:
        objects = render("base")
        (container,) = find(objects, "Deployment", "coordinator")["spec"]["template"]["spec"]["containers"]
        self.liveness, self.readiness = (
            container[f"{kind}Probe"]["grpc"]["service"] for kind in ("liveness", "readiness")
        )
        given = settings(objects, container)
        own = {"COORDINATOR_SHARD": ",".join(shards), "COORDINATOR_STATE_DIR": str(directory / name)}
        (directory / name).mkdir()
        self._file = directory / f"{name}.port"
        # The health-only port is the probes'; here the service itself is asked, whose answer is the same.
        flags = ["--listen", "127.0.0.1:0", "--port-file", str(self._file)]
        self.process = DaemonProcess(flags, log=directory / f"{name}.log", env=given | own, module="coordinator")
        until(lambda: self._file.exists() or not self.process.alive, "the coordinator to listen")
        assert self.process.alive, self.process.log()
        host, _, port = self._file.read_text(encoding="utf-8").strip().rpartition(":")
        self.address = (host, int(port))

    def healthy(self, service: str) -> bool:
        """A probe."""
        with grpc.insecure_channel(f"{self.address[0]}:{self.address[1]}") as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class Load:
    """Clients that forward one after another until stopped, with retries on."""

    def __init__(self, target: str, model: Model) -> None:
        self.answered, self.failures = 0, []
        self._target, self._model = target, model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with Client(self._target, retries=True) as client:
            while not self._stop.is_set():
                try:
                    self._model.check(client.forward(NAME, self._model.inputs, timeout=60))
                    self.answered += 1
                except Exception as error:
                    self.failures.append(error)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)
            assert not thread.is_alive()


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    with Daemons(2, tmp_path, model_root=tmp_path) as found:
        yield found


def test_a_rolling_update_loses_no_request(daemons: Daemons, tmp_path: Path) -> None:
    model = Model(tmp_path)
    old = Coordinator(tmp_path, "old", daemons.addresses)
    service = Relay(Path("/proc/self/ns/net"), old.address)
    running = [old]
    try:
        with Client(service.target) as client:
            until(lambda: client.health()["serving"], "the group to form")
            client.load(NAME, FILE, timeout=60)
        load = Load(service.target, model)
        until(lambda: load.answered >= 20, "load")

        new = Coordinator(tmp_path, "new", daemons.addresses)
        running.append(new)
        until(lambda: new.healthy(new.liveness), "the new pod to be up")
        before = load.answered
        until(lambda: load.answered >= before + 20, "clients to go on beside the new pod")  # the preStop pause
        assert not new.healthy(new.readiness)
        assert old.process.stop() == 0
        until(lambda: new.healthy(new.readiness), "the new pod to be ready")
        service.lead_to(new.address)

        with Client(f"{new.address[0]}:{new.address[1]}") as client:
            took = served(client, model)
            health = client.health()
        before = load.answered
        until(lambda: load.answered >= before + 20, "clients to go on with the new pod")
        load.stop()
        print(f"{load.answered} answers; the new coordinator served {took:.2f} s after the old one ended")
        assert load.failures == []
        assert health["coordinator"]["pid"] == new.process.pid
        assert [rank["loads"] for rank in health["ranks"]] == [1, 1]  # weights stayed where they were
    finally:
        service.close()
        for each in running:
            each.process.kill()
