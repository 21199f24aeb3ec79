"""What one object says about another, and what pods tell the programs in them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator import config as coordinator_config
from shardd import config as shardd_config
from tests.deploy.manifests import OVERLAYS, ROOT, Object, find, of_kind, pods, render, settings
from tests.deploy.references import dangling, shard_addresses


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_dangles(overlay: str) -> None:
    assert dangling(render(overlay)) == []


def _pod(objects: list[Object]) -> Object:
    return find(objects, "StatefulSet", "shardd")["spec"]["template"]["spec"]


def _spec(kind: str, name: str) -> Callable[[list[Object]], Object]:
    return lambda objects: find(objects, kind, name)["spec"]


def _container(objects: list[Object]) -> Object:
    return _pod(objects)["containers"][0]


COORDINATOR, SHARDD = _spec("Service", "coordinator"), _spec("StatefulSet", "shardd")
POLICY, BUDGET = _spec("NetworkPolicy", "shardd"), _spec("PodDisruptionBudget", "shardd")
CERTIFICATE, ISSUER = _spec("Certificate", "shardd"), _spec("Issuer", "tensor-parallel")
MONITOR, SCALER = _spec("ServiceMonitor", "coordinator"), _spec("HorizontalPodAutoscaler", "shardd")


@pytest.mark.parametrize(
    ("overlay", "spoil", "line"),
    [
        ("base", lambda o: COORDINATOR(o)["selector"].update(x="y"), "selects no pod"),
        ("base", lambda o: COORDINATOR(o)["ports"][0].update(targetPort="http"), "no port http"),
        ("base", lambda o: SHARDD(o).update(serviceName="x"), "no headless Service x"),
        ("base", lambda o: _container(o)["startupProbe"]["grpc"].update(port=7), "asks port 7"),
        ("base", lambda o: _container(o)["readinessProbe"]["grpc"].update(service="x"), "no health service"),
        ("base", lambda o: _container(o).pop("livenessProbe"), "livenessProbe: missing"),
        ("base", lambda o: _container(o)["envFrom"][0]["configMapRef"].update(name="x"), "no ConfigMap x"),
        ("base", lambda o: _container(o)["env"].pop(0), "no variable"),
        ("base", lambda o: _container(o)["ports"][1].update(containerPort=7000), "port 7000 twice"),
        ("base", lambda o: _pod(o)["volumes"].pop(0), "not there"),
        ("base", lambda o: _pod(o)["volumes"][0]["persistentVolumeClaim"].update(claimName="x"), "no claim x"),
        ("base", lambda o: _pod(o).update(serviceAccountName="x"), "no ServiceAccount x"),
        ("base", lambda o: POLICY(o)["ingress"][2]["ports"][0].update(port=1, endPort=2), "no pod has a port 1"),
        ("base", lambda o: BUDGET(o)["selector"]["matchLabels"].update(x="y"), "selects no pod"),
        ("overlays/dra", lambda o: _pod(o)["resourceClaims"][0].update(resourceClaimTemplateName="x"), "template x"),
        ("overlays/tls", lambda o: CERTIFICATE(o).update(secretName="x"), "nobody uses"),
        ("overlays/tls", lambda o: ISSUER(o)["ca"].update(secretName="x"), "nobody makes"),
        ("overlays/monitoring", lambda o: MONITOR(o)["endpoints"][0].update(port="x"), "port x"),
        ("overlays/replicas", lambda o: SCALER(o)["scaleTargetRef"].update(name="x"), "no StatefulSet x"),
    ],
)
def test_what_dangles_is_found(overlay: str, spoil: Callable[[list[Object]], Any], line: str) -> None:
    objects = copy.deepcopy(render(overlay))
    spoil(objects)
    assert any(line in found for found in dangling(objects)), dangling(objects)


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if overlay != "overlays/replicas"])
def test_the_coordinator_knows_every_rank_in_order(overlay: str) -> None:
    """Its list is what the pods' names, their governing Service and their ports make, and no more."""
    objects = render(overlay)
    container = find(objects, "Deployment", "coordinator")["spec"]["template"]["spec"]["containers"][0]
    assert settings(objects, container)["COORDINATOR_SHARD"].split(",") == list(shard_addresses(objects))


def test_a_replica_group_is_complete_in_its_pod() -> None:
    objects = render("overlays/replicas")
    ranks, coordinator = _pod(objects)["containers"]
    addresses = settings(objects, coordinator)["COORDINATOR_SHARD"].split(",")
    assert addresses == [f"127.0.0.1:{7000 + rank}" for rank in range(len(addresses))]
    assert f"--ranks={len(addresses)}" in ranks["args"]
    assert "--listen=127.0.0.1:7000" in ranks["args"]
    shared = [[m["mountPath"] for m in c["volumeMounts"] if m["name"] == "shm"] for c in (ranks, coordinator)]
    assert shared == [["/dev/shm"], ["/dev/shm"]]


# ---- flags and settings are the programs' own


POD_VALUES = {"POD_IP": "10.0.0.1", "NODE_INDEX": "0", "LWS_GROUP_SIZE": "2"}


def arguments(container: Object, given: dict[str, str] = POD_VALUES) -> list[str]:
    return [re.sub(r"\$\((\w+)\)", lambda name: given[name[1]], argument) for argument in container["args"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_programs_accept_their_flags_and_variables(overlay: str, tmp_path: Path) -> None:
    objects = render(overlay)
    for pod in pods(objects):
        for container in pod.containers:
            variables = _local(settings(objects, container), tmp_path)
            program = container.get("command", [None])[0]
            if program == "coordinator":
                parsed = coordinator_config.parse(arguments(container), variables)
                assert parsed.health_listen
                assert parsed.world_size == len(parsed.shards)
            elif program == "shardd":
                shardd_config.read_config(arguments(container), variables)
            elif program == "shardctl":
                _accepts_node(container, variables)


def _local(variables: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The same variables, with stand-ins for files and directories that only the pod has."""
    changed = dict(variables)
    for name, value in variables.items():
        if value.startswith("/"):
            path = tmp_path / value.strip("/").replace("/", "_")
            path.mkdir(exist_ok=True) if "." not in path.name else path.write_text("x")
            changed[name] = str(path)
    return changed


def _accepts_node(container: Object, variables: dict[str, str]) -> None:
    from coordinator.cli.node import _place, node

    assert container["command"] == ["shardctl", "node"]
    _place(node.make_context("node", arguments(container)).params)
    # Its daemons inherit the variables.
    shardd_config.read_config(["--rank=0", "--world-size=1"], variables)


@pytest.mark.parametrize("overlay", ["base", "overlays/multinode"])
def test_ranks_follow_from_a_pods_place(overlay: str) -> None:
    """Each pod's supervisor, told its index and the size of its set as its controller would, starts its own ranks."""
    from coordinator.cli.node import _place, node

    objects = render(overlay)
    (pod,) = [pod for pod in pods(objects) if pod.names]
    (container,) = pod.containers
    starts = []
    for index in range(len(pod.names)):
        given = POD_VALUES | {"NODE_INDEX": str(index), "LWS_GROUP_SIZE": str(len(pod.names))}
        placed = node.make_context("node", arguments(container, given)).params
        _place(placed)
        assert placed["world_size"] == len(shard_addresses(objects))
        starts += range(placed["rank_offset"], placed["rank_offset"] + placed["ranks"])
    assert starts == list(range(len(shard_addresses(objects))))


# ---- copies


def test_the_cluster_has_the_same_alerts() -> None:
    (rule,) = of_kind(render("overlays/monitoring"), "PrometheusRule")
    alerts = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text(encoding="utf-8"))
    assert _folded(rule["spec"]) == _folded(alerts)


def _folded(value: Any) -> Any:
    """White space means nothing in these texts, and kustomize wraps long lines in its own way."""
    if isinstance(value, dict):
        return {key: _folded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_folded(each) for each in value]
    return " ".join(value.split()) if isinstance(value, str) else value


def test_the_dashboard_is_the_one_for_grafana() -> None:
    dashboard = find(render("overlays/monitoring"), "ConfigMap", "dashboard")
    assert dashboard["data"]["dashboard.json"] == (ROOT / "deploy/monitoring/dashboard.json").read_text(
        encoding="utf-8"
    )
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
