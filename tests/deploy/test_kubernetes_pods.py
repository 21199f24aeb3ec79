"""What every pod must be: confined, bounded, pinned, with time to drain and GPUs that see each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator import config as coordinator_config
from tests.deploy.manifests import OVERLAYS, Object, Pod, find, of_kind, pods, render, settings


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
            drains += [float(a.partition("=")[2]) for a in container["args"] if a.startswith("--drain-seconds=")]
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
