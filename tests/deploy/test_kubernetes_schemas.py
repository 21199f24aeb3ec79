"""Every object of every overlay against the schemas of its kind, and the sources behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import schemas
from tests.deploy.manifests import KUBERNETES, OVERLAYS, Object, render

OLDEST = {"overlays/dra": (1, 34)}  # resource.k8s.io/v1


def release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


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
