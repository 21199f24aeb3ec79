"""Strict validation: Kubernetes' own kinds by the schemas of its releases, others by the schemas beside this file.

A kind without a schema is an error: nothing passes because nobody looked.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
from kubernetes_validate import utils
from referencing import Registry, Resource

HERE = Path(__file__).with_name("schemas")
OLDEST = (1, 31)


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


RELEASES = sorted(
    {f"{major}.{minor}" for major, minor in map(_release, utils.all_versions()) if (major, minor) >= OLDEST},
    key=_release,
)


class Invalid(Exception):
    """The object is not what its kind allows; the message says where."""


@functools.cache
def _definitions(release: str) -> Resource[Any]:
    directory = f"kubernetes-json-schema/v{release}.0-local-strict"
    return Resource.from_contents(utils.schema_contents(f"{directory}/_definitions.json", release))


@functools.cache
def _own(group_version: str, kind: str, release: str) -> jsonschema.Draft202012Validator | None:
    group, _, version = group_version.rpartition("/")
    if "." in group and not group.endswith(".k8s.io"):
        return None
    name = f"{kind}-{group.split('.')[0]}-{version}" if group else f"{kind}-{version}"
    directory = f"kubernetes-json-schema/v{release}.0-local-strict"
    try:
        schema = utils.schema_contents(f"{directory}/{name.lower()}.json", release)
    except FileNotFoundError:
        return None
    registry: Registry[Any] = _definitions(release) @ (Resource.from_contents(schema) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


@functools.cache
def _custom(group_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    path = HERE / f"{kind.lower()}.json"
    if not path.exists():
        return None
    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema) if schema["x-api-version"] == group_version else None


def check(item: dict[str, Any], release: str) -> None:
    """Raise :class:`Invalid` unless ``item`` is a valid object for that Kubernetes release, unknown fields included."""
    kind, group_version = item["kind"], item["apiVersion"]
    validator = _own(group_version, kind, release) or _custom(group_version, kind)
    if validator is None:
        raise Invalid(f"no schema for {group_version} {kind} in Kubernetes {release}")
    for error in validator.iter_errors(item):
        raise Invalid(f"{kind} {item['metadata']['name']}: {error.json_path}: {error.message[:300]}")
    if kind == "LeaderWorkerSet":  # its pods are ordinary ones
        for template in ("leaderTemplate", "workerTemplate"):
            if pod := item["spec"]["leaderWorkerTemplate"].get(template):
                check(
                    {"apiVersion": "v1", "kind": "PodTemplate", "metadata": item["metadata"], "template": pod}, release
                )
