"""The Kubernetes manifests as rendered objects, and the pods in them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("base", *sorted(f"overlays/{path.name}" for path in (KUBERNETES / "overlays").iterdir()))
Object = dict[str, Any]


@functools.cache
def _text(directory: Path) -> str:
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", str(directory)]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", str(directory)]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecation warnings
    return done.stdout


def render(overlay: str | Path) -> list[Object]:
    """What ``kubectl apply -k`` would send; a copy that the caller may change."""
    directory = KUBERNETES / overlay if isinstance(overlay, str) else overlay
    return [document for document in yaml.safe_load_all(_text(directory)) if document]


@dataclass(frozen=True)
class Pod:
    """A pod template, and the names of the pods that its owner makes from it."""

    owner: Object
    labels: dict[str, str]
    spec: Object
    names: tuple[str, ...] = ()

    @property
    def containers(self) -> list[Object]:
        return list(self.spec["containers"])

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for c in self.containers for port in c.get("ports", [])}


def name_of(item: Object) -> str:
    return str(item["metadata"]["name"])


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [item for item in of_kind(objects, kind) if name_of(item) == name]
    return found


def pods(objects: list[Object]) -> Iterator[Pod]:
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        template = item["spec"]["template"]
        ordinals = range(item["spec"]["replicas"]) if item["kind"] == "StatefulSet" else ()
        names = tuple(f"{name_of(item)}-{ordinal}" for ordinal in ordinals)
        yield Pod(item, template["metadata"]["labels"], template["spec"], names)
    for item in of_kind(objects, "LeaderWorkerSet"):
        group = item["spec"]["leaderWorkerTemplate"]
        template = group["workerTemplate"]
        names = tuple(
            f"{name_of(item)}-{replica}" + (f"-{worker}" if worker else "")
            for replica in range(item["spec"]["replicas"])
            for worker in range(group["size"])
        )
        yield Pod(item, template["metadata"]["labels"], template["spec"], names)


def settings(objects: list[Object], container: Object) -> dict[str, str]:
    """The container's environment from config maps and literal values; values from the pod itself are left out."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= find(objects, "ConfigMap", source["configMapRef"]["name"]).get("data", {})
    found |= {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}
    return found


def matches(selector: Object, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "only matchLabels are understood here"
    return selector.get("matchLabels", {}).items() <= labels.items()
