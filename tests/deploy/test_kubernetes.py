"""The manifests, without a cluster: schemas of every supported release, references, and what a pod must be."""

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
from tests.deploy import schemas
from tests.deploy.manifests import KUBERNETES, OVERLAYS, Object, Pod, find, name_of, of_kind, pods, render, settings
from tests.deploy.references import dangling, shard_addresses

OLDEST = {"overlays/dra": (1, 34)}  # resource.k8s.io/v1


def release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


# ---- schemas


@pytest.mark.parametrize("version", schemas.RELEASES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str, version: str) -> None:
    if release(version) < OLDEST.get(overlay, (0, 0)):
        with pytest.raises(schemas.Invalid, match="no schema"):  # the guide's requirement is true
            [schemas.check(item, version) for item in render(overlay)]
        return
    for item in render(overlay):
        schemas.check(item, version)


def test_the_releases_that_are_promised_are_checked() -> None:
    assert {"1.31", "1.32", "1.33", "1.34", "1.35", "1.36"} <= set(schemas.RELEASES)


@pytest.mark.parametrize(
    ("overlay", "kind", "spoil", "message"),
    [
        ("base", "Deployment", lambda o: o["spec"].update(replica=2), "replica"),
        ("base", "Service", lambda o: o["spec"]["ports"][0].update(port="x"), "port"),
        ("base", "Service", lambda o: o.update(kind="Servise"), "no schema"),
        ("overlays/multinode", "LeaderWorkerSet", lambda o: o["spec"].update(size=2), "size"),
        (
            "overlays/multinode",
            "LeaderWorkerSet",
            lambda o: o["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(volume=[]),
            "volume",
        ),
        ("overlays/tls", "Certificate", lambda o: o["spec"].pop("issuerRef"), "issuerRef"),
        ("overlays/tls", "Certificate", lambda o: o["spec"].update(duration="90 days"), "duration"),
        ("overlays/tls", "Issuer", lambda o: o.update(apiVersion="cert-manager.io/v2"), "no schema"),
        ("overlays/monitoring", "ServiceMonitor", lambda o: o["spec"]["endpoints"][0].update(ports="x"), "ports"),
        ("overlays/dra", "ResourceClaimTemplate", lambda o: o["spec"]["spec"]["devices"].update(request=[]), "request"),
    ],
)
def test_what_is_wrong_is_refused(overlay: str, kind: str, spoil: Callable[[Object], Any], message: str) -> None:
    item = copy.deepcopy(next(item for item in render(overlay) if item["kind"] == kind))
    spoil(item)
    with pytest.raises(schemas.Invalid, match=message):
        schemas.check(item, schemas.RELEASES[-1])


# ---- references


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_dangles(overlay: str) -> None:
    assert dangling(render(overlay)) == []


def _pod(objects: list[Object]) -> Object:
    return find(objects, "StatefulSet", "shardd")["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("overlay", "spoil", "line"),
    [
        ("base", lambda o: find(o, "Service", "coordinator")["spec"]["selector"].update(x="y"), "selects no pod"),
        ("base", lambda o: find(o, "Service", "coordinator")["spec"]["ports"][0].update(targetPort="http"), "no port http"),
        ("base", lambda o: find(o, "StatefulSet", "shardd")["spec"].update(serviceName="x"), "no headless Service x"),
        ("base", lambda o: _pod(o)["containers"][0]["startupProbe"]["grpc"].update(port=7), "asks port 7"),
        ("base", lambda o: _pod(o)["containers"][0]["readinessProbe"]["grpc"].update(service="x"), "no health service"),
        ("base", lambda o: _pod(o)["containers"][0].pop("livenessProbe"), "livenessProbe: missing"),
        ("base", lambda o: _pod(o)["containers"][0]["envFrom"][0]["configMapRef"].update(name="x"), "no ConfigMap x"),
        ("base", lambda o: _pod(o)["containers"][0]["env"].pop(0), "no variable"),
        ("base", lambda o: _pod(o)["volumes"].pop(0), "not there"),
        ("base", lambda o: _pod(o)["volumes"][0]["persistentVolumeClaim"].update(claimName="x"), "no claim x"),
        ("base", lambda o: _pod(o).update(serviceAccountName="x"), "no ServiceAccount x"),
        ("base", lambda o: find(o, "NetworkPolicy", "shardd")["spec"]["ingress"][2]["ports"][0].update(port=1, endPort=2), "no pod has a port 1"),
        ("base", lambda o: find(o, "PodDisruptionBudget", "shardd")["spec"]["selector"]["matchLabels"].update(x="y"), "selects no pod"),
        ("overlays/dra", lambda o: _pod(o)["resourceClaims"][0].update(resourceClaimTemplateName="x"), "no template x"),
        ("overlays/tls", lambda o: find(o, "Certificate", "shardd")["spec"].update(secretName="x"), "nobody uses"),
        ("overlays/tls", lambda o: find(o, "Issuer", "tensor-parallel")["spec"]["ca"].update(secretName="x"), "nobody makes"),
        ("overlays/monitoring", lambda o: find(o, "ServiceMonitor", "coordinator")["spec"]["endpoints"][0].update(port="x"), "port x"),
        ("overlays/replicas", lambda o: find(o, "HorizontalPodAutoscaler", "shardd")["spec"]["scaleTargetRef"].update(name="x"), "no StatefulSet x"),
    ],
)  # fmt: skip
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


def arguments(container: Object) -> list[str]:
    return [re.sub(r"\$\((\w+)\)", lambda name: POD_VALUES[name[1]], argument) for argument in container["args"]]


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
    from coordinator.cli import app

    command, verb = container["command"]
    assert (command, verb) == ("shardctl", "node")
    node = app.commands[verb]
    node.make_context(verb, arguments(container), resilient_parsing=False)
    # Its daemons inherit the variables.
    shardd_config.read_config(["--rank=0", "--world-size=1"], variables)


# ---- what a pod must be


def size(text: str) -> int:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return int(text[:-2]) * units[text[-2:]] if text[-2:] in units else int(text)


@pytest.fixture(params=OVERLAYS)
def checked(request: pytest.FixtureRequest) -> list[tuple[list[Object], Pod]]:
    objects = render(request.param)
    return [(objects, pod) for pod in pods(objects)]


def test_pods_are_confined(checked: list[tuple[list[Object], Pod]]) -> None:
    """The restricted Pod Security Standard, a fixed user, a read-only root, and no token for the Kubernetes API."""
    for _, pod in checked:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        assert not any("hostPath" in volume for volume in pod.spec["volumes"])
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            # Service links would set COORDINATOR_PORT and the like, which the programs take for settings.
        assert pod.spec["enableServiceLinks"] is False


def test_pods_have_limits_that_count_shared_memory(checked: list[tuple[list[Object], Pod]]) -> None:
    for _, pod in checked:
        memory = {
            v["name"]: size(v["emptyDir"]["sizeLimit"])
            for v in pod.spec["volumes"]
            if v.get("emptyDir", {}).get("medium")
        }
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"])
            mounted = sum(memory.get(mount["name"], 0) for mount in container["volumeMounts"])
            assert size(resources["limits"]["memory"]) - mounted >= size("1Gi")
            assert size(resources["requests"]["memory"]) <= size(resources["limits"]["memory"])


def test_images_are_pinned(checked: list[tuple[list[Object], Pod]]) -> None:
    for _, pod in checked:
        for container in pod.containers:
            _, _, tag = container["image"].rpartition(":")
            assert re.search(r"\d+\.\d+\.\d+", tag), container["image"]
            assert container.get("imagePullPolicy") != "Always"


def test_models_cannot_be_written(checked: list[tuple[list[Object], Pod]]) -> None:
    for _, pod in checked:
        for volume in pod.spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["readOnly"] is True
                mounts = [m for c in pod.containers for m in c["volumeMounts"] if m["name"] == volume["name"]]
                assert mounts
                assert all(mount["readOnly"] is True for mount in mounts)


def test_there_is_time_to_drain(checked: list[tuple[list[Object], Pod]]) -> None:
    for objects, pod in checked:
        for container in pod.containers:
            pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            drains = [float(v) for k, v in settings(objects, container).items() if k.endswith("_DRAIN_SECONDS")]
            assert pod.spec["terminationGracePeriodSeconds"] >= pause + max(drains, default=0) + 10


def test_gpus_of_a_pod_are_one_container_or_one_claim(checked: list[tuple[list[Object], Pod]]) -> None:
    """NCCL uses NVLink only between GPUs that a process may open: no container may be given one GPU of several."""
    for objects, pod in checked:
        counts = [c["resources"].get("limits", {}).get("nvidia.com/gpu") for c in pod.containers]
        claims = [c["resources"].get("claims") for c in pod.containers if c["resources"].get("claims")]
        asked = [count for count in counts if count]
        assert len(asked) <= 1
        if asked:
            (container,) = [c for c in pod.containers if c["resources"].get("limits", {}).get("nvidia.com/gpu")]
            assert f"--ranks={asked[0]}" in container["args"]
            assert container["resources"]["requests"]["nvidia.com/gpu"] == asked[0]
        if claims:
            assert all(claim == claims[0] for claim in claims)
            template = find(
                objects, "ResourceClaimTemplate", pod.spec["resourceClaims"][0]["resourceClaimTemplateName"]
            )
            (request,) = template["spec"]["spec"]["devices"]["requests"]
            assert request["exactly"]["count"] == len(pod.containers)
            pins = [settings(objects, c)["CUDA_VISIBLE_DEVICES"] for c in pod.containers]
            assert pins == [str(index) for index in range(len(pins))]
            assert all(settings(objects, c)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" for c in pod.containers)


def test_a_dead_worker_is_replaced_alone() -> None:
    item = next(iter(of_kind(render("overlays/multinode"), "LeaderWorkerSet")))
    assert item["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "None"


def test_the_autoscaler_follows_a_metric_that_exists() -> None:
    source = Path(coordinator_config.__file__).with_name("metrics.py").read_text(encoding="utf-8")
    for item in of_kind(render("overlays/replicas"), "HorizontalPodAutoscaler"):
        for metric in item["spec"]["metrics"]:
            name = metric["pods"]["metric"]["name"]
            assert f'"{name}"' in source or f'"{name.removeprefix("coordinator_")}"' in source


# ---- the sources, also where nothing can render them


def test_sources_are_complete() -> None:
    """Every file that a kustomization names is there, and every manifest is named by one."""
    named: set[Path] = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(content) <= {
            "apiVersion", "kind", "namespace", "labels", "resources", "components", "images", "configMapGenerator",
            "patches", "configurations", "generatorOptions",
        }  # fmt: skip
        files = [*content.get("resources", []), *content.get("components", []), *content.get("configurations", [])]
        files += [patch["path"] for patch in content.get("patches", []) if "path" in patch]
        files += [name for generator in content.get("configMapGenerator", []) for name in generator.get("files", [])]
        for file in files:
            target = (path.parent / file.rpartition("=")[2]).resolve()
            assert target.exists(), f"{path}: {file}"
            named.add(target)
    sources = {path.resolve() for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert sources <= named, sources - named
