"""Everything that one object says about another: names, selectors, ports, volumes, claims. A dangling one is a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.deploy.manifests import Object, Pod, find, matches, name_of, of_kind, pods

# The services of grpc.health.v1 that each program answers for on its health port.
HEALTH_SERVICES = {
    "shardd": {"liveness", "readiness"},
    "shardctl": {"liveness", "readiness"},
    "coordinator": {"liveness", "coordinator", ""},
}
# Made by controllers, not by us: pod labels that a field reference may name, and variables.
CONTROLLER_LABELS = {
    "StatefulSet": {"apps.kubernetes.io/pod-index"},
    "LeaderWorkerSet": {"leaderworkerset.sigs.k8s.io/worker-index"},
}
CONTROLLER_VARIABLES = {"LeaderWorkerSet": {"LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS"}}


def dangling(objects: list[Object]) -> list[str]:
    found = list(pods(objects))
    lines: list[str] = []
    for check in (
        _pods,
        _services,
        _policies,
        _budgets,
        _stateful,
        _autoscalers,
        _certificates,
        _monitors,
        _duplicates,
    ):
        lines += check(objects, found)
    return lines


def _names(objects: list[Object], kind: str) -> set[str]:
    return {name_of(item) for item in of_kind(objects, kind)}


def _secrets(objects: list[Object]) -> set[str]:
    """Those in the manifests, and those that a Certificate will make."""
    return _names(objects, "Secret") | {item["spec"]["secretName"] for item in of_kind(objects, "Certificate")}


# ---- inside pods


def _pods(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    for pod in found:
        where = f"{pod.owner['kind']} {name_of(pod.owner)}"
        if pod.owner["kind"] != "LeaderWorkerSet" and not matches(pod.owner["spec"]["selector"], pod.labels):
            yield f"{where}: selector does not match its own pods"
        if pod.spec.get("serviceAccountName") not in _names(objects, "ServiceAccount"):
            yield f"{where}: no ServiceAccount {pod.spec.get('serviceAccountName')}"
        yield from (f"{where}: {line}" for line in _volumes(objects, pod))
        yield from (f"{where}: {line}" for line in _claims(objects, pod))
        for container in pod.containers:
            yield from (f"{where}/{container['name']}: {line}" for line in _container(objects, pod, container))
        numbers = [port["containerPort"] for c in pod.containers for port in c.get("ports", [])]
        names = [port["name"] for c in pod.containers for port in c.get("ports", [])]
        for kind, values in (("port", numbers), ("port name", names)):
            yield from (
                f"{where}: {kind} {value} twice" for value in sorted({v for v in values if values.count(v) > 1})
            )


def _volumes(objects: list[Object], pod: Pod) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounted = {mount["name"] for c in pod.containers for mount in c.get("volumeMounts", [])}
    yield from (f"volume {name} is mounted but not there" for name in sorted(mounted - set(volumes)))
    yield from (f"volume {name} is never mounted" for name in sorted(set(volumes) - mounted))
    for name, volume in volumes.items():
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            if claim not in _names(objects, "PersistentVolumeClaim"):
                yield f"volume {name}: no claim {claim}"
        elif "configMap" in volume:
            if volume["configMap"]["name"] not in _names(objects, "ConfigMap"):
                yield f"volume {name}: no ConfigMap {volume['configMap']['name']}"
        elif "secret" in volume:
            secret = volume["secret"]
            if secret["secretName"] not in _secrets(objects) and not secret.get("optional"):
                yield f"volume {name}: no Secret {secret['secretName']}"
        elif "emptyDir" not in volume:
            yield f"volume {name}: a kind that is not checked here: {sorted(volume)}"


def _claims(objects: list[Object], pod: Pod) -> Iterator[str]:
    claims = {claim["name"]: claim for claim in pod.spec.get("resourceClaims", [])}
    used = {claim["name"] for c in pod.containers for claim in c.get("resources", {}).get("claims", [])}
    yield from (f"resource claim {name} is used but not there" for name in sorted(used - set(claims)))
    yield from (f"resource claim {name} is never used" for name in sorted(set(claims) - used))
    for name, claim in claims.items():
        if claim["resourceClaimTemplateName"] not in _names(objects, "ResourceClaimTemplate"):
            yield f"resource claim {name}: no template {claim['resourceClaimTemplateName']}"


def _container(objects: list[Object], pod: Pod, container: Object) -> Iterator[str]:
    for source in container.get("envFrom", []):
        if source["configMapRef"]["name"] not in _names(objects, "ConfigMap"):
            yield f"no ConfigMap {source['configMapRef']['name']}"
    variables = {item["name"] for item in container.get("env", [])} | CONTROLLER_VARIABLES.get(pod.owner["kind"], set())
    for text in [*container.get("command", []), *container.get("args", [])]:
        yield from (
            f"no variable {name} for {text}" for name in re.findall(r"\$\((\w+)\)", text) if name not in variables
        )
    for item in container.get("env", []):
        path = item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        if label and label[1] not in set(pod.labels) | CONTROLLER_LABELS.get(pod.owner["kind"], set()):
            yield f"{item['name']}: pods of a {pod.owner['kind']} have no label {label[1]}"
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        yield from (f"{kind}: {line}" for line in _probe(container, container.get(kind, {})))


def _probe(container: Object, probe: Object) -> Iterator[str]:
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    if "httpGet" in probe:
        port = probe["httpGet"]["port"]
        if port not in ports and port not in ports.values():
            yield f"no port {port}"
        return
    if "grpc" not in probe:
        yield "missing, or of a kind that is not checked here"
        return
    port, service = probe["grpc"]["port"], probe["grpc"].get("service", "")
    program = container["command"][0]
    if service not in HEALTH_SERVICES[program]:
        yield f"{program} answers for no health service {service!r}"
    listens = [int(arg.rpartition(":")[2]) for arg in container["args"] if arg.startswith("--health-listen=")]
    if listens != [port]:
        yield f"asks port {port}, but health is on {listens}"
    if port not in ports.values():
        yield f"no container port {port}"


# ---- between objects


def _selected(selector: dict[str, str], found: list[Pod]) -> list[Pod]:
    return [pod for pod in found if selector.items() <= pod.labels.items()]


def _services(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    for service in of_kind(objects, "Service"):
        where = f"Service {name_of(service)}"
        chosen = _selected(service["spec"]["selector"], found)
        if not chosen:
            yield f"{where}: selects no pod"
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            yield from (
                f"{where}: no port {target} in {name_of(pod.owner)}"
                for pod in chosen
                if target not in pod.ports and target not in pod.ports.values()
            )


def _stateful(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    for item in of_kind(objects, "StatefulSet"):
        governing = item["spec"]["serviceName"]
        services = [service for service in of_kind(objects, "Service") if name_of(service) == governing]
        if not services or services[0]["spec"].get("clusterIP") != "None":
            yield f"StatefulSet {name_of(item)}: no headless Service {governing}"
        elif not services[0]["spec"]["selector"].items() <= item["spec"]["template"]["metadata"]["labels"].items():
            yield f"StatefulSet {name_of(item)}: its Service {governing} does not select its pods"


def _policies(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    for policy in of_kind(objects, "NetworkPolicy"):
        where = f"NetworkPolicy {name_of(policy)}"
        selector = policy["spec"]["podSelector"]
        chosen = [pod for pod in found if matches(selector, pod.labels)]
        if not chosen:
            yield f"{where}: selects no pod"
        for rule in policy["spec"].get("ingress") or []:
            yield from (f"{where}: {line}" for line in _peers(rule.get("from", []), found))
            yield from (f"{where}: {line}" for line in _policy_ports(rule.get("ports", []), chosen))
        for rule in policy["spec"].get("egress") or []:
            yield from (f"{where}: {line}" for line in _peers(rule.get("to", []), found))
            ours = [pod for peer in rule.get("to", []) for pod in found if _is_peer(peer, pod)]
            if ours:
                yield from (f"{where}: {line}" for line in _policy_ports(rule.get("ports", []), ours))


def _is_peer(peer: Object, pod: Pod) -> bool:
    return "podSelector" in peer and "namespaceSelector" not in peer and matches(peer["podSelector"], pod.labels)


def _peers(peers: list[Object], found: list[Pod]) -> Iterator[str]:
    for peer in peers:
        if "podSelector" in peer and "namespaceSelector" not in peer and not any(_is_peer(peer, pod) for pod in found):
            yield f"peer {peer['podSelector']} is no pod"


def _policy_ports(ports: list[Object], chosen: list[Pod]) -> Iterator[str]:
    for port in ports:
        first = port["port"]
        last = port.get("endPort", first)
        if not any(
            first in pod.ports
            if isinstance(first, str)
            else any(first <= number <= last for number in pod.ports.values())
            for pod in chosen
        ):
            yield f"no pod has a port {first}"


def _budgets(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    for budget in of_kind(objects, "PodDisruptionBudget"):
        if not any(matches(budget["spec"]["selector"], pod.labels) for pod in found):
            yield f"PodDisruptionBudget {name_of(budget)}: selects no pod"


def _autoscalers(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    for item in of_kind(objects, "HorizontalPodAutoscaler"):
        target = item["spec"]["scaleTargetRef"]
        if target["name"] not in _names(objects, target["kind"]):
            yield f"HorizontalPodAutoscaler {name_of(item)}: no {target['kind']} {target['name']}"


def _certificates(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    mounted = {v["secret"]["secretName"] for pod in found for v in pod.spec.get("volumes", []) if "secret" in v}
    authorities = {item["spec"]["ca"]["secretName"] for item in of_kind(objects, "Issuer") if "ca" in item["spec"]}
    for item in of_kind(objects, "Certificate"):
        issuer = item["spec"]["issuerRef"]
        if issuer["name"] not in _names(objects, issuer["kind"]):
            yield f"Certificate {name_of(item)}: no {issuer['kind']} {issuer['name']}"
        if item["spec"]["secretName"] not in mounted | authorities:
            yield f"Certificate {name_of(item)}: nobody uses its Secret {item['spec']['secretName']}"
    for item in of_kind(objects, "Issuer"):
        if "ca" in item["spec"] and item["spec"]["ca"]["secretName"] not in _secrets(objects):
            yield f"Issuer {name_of(item)}: nobody makes its Secret {item['spec']['ca']['secretName']}"


def _monitors(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    for item in of_kind(objects, "ServiceMonitor"):
        services = [
            s for s in of_kind(objects, "Service") if matches(item["spec"]["selector"], s["metadata"]["labels"])
        ]
        named = {port["name"] for service in services for port in service["spec"]["ports"]}
        for endpoint in item["spec"]["endpoints"]:
            if endpoint["port"] not in named:
                yield f"ServiceMonitor {name_of(item)}: no Service has a port {endpoint['port']}"
    for item in of_kind(objects, "PodMonitor"):
        ports = {name for pod in found if matches(item["spec"]["selector"], pod.labels) for name in pod.ports}
        for endpoint in item["spec"]["podMetricsEndpoints"]:
            wanted = endpoint.get("port") or _kept(endpoint["relabelings"])
            if not any(re.fullmatch(wanted, name) for name in ports):
                yield f"PodMonitor {name_of(item)}: no pod has a port {wanted}"


def _kept(relabelings: list[Object]) -> str:
    by_port = [r for r in relabelings if r.get("sourceLabels") == ["__meta_kubernetes_pod_container_port_name"]]
    return str(by_port[0]["regex"]) if by_port and by_port[0]["action"] == "keep" else "(nothing)"


def _duplicates(objects: list[Object], found: list[Pod]) -> Iterator[str]:
    seen: set[tuple[Any, ...]] = set()
    for item in objects:
        key = (item["apiVersion"], item["kind"], item["metadata"].get("namespace"), name_of(item))
        if key in seen:
            yield f"{item['kind']} {name_of(item)} twice"
        seen.add(key)


def shard_addresses(objects: list[Object]) -> dict[str, tuple[str, int]]:
    """Every ``host:port`` that a rank's daemon has in the cluster, by address: the pod's name and container port."""
    found: dict[str, tuple[str, int]] = {}
    services = {
        name_of(service) for service in of_kind(objects, "Service") if service["spec"].get("clusterIP") == "None"
    }
    for pod in pods(objects):
        # The controller of a LeaderWorkerSet makes a headless Service of the set's name.
        governing = (
            name_of(pod.owner) if pod.owner["kind"] == "LeaderWorkerSet" else pod.owner["spec"].get("serviceName")
        )
        if pod.owner["kind"] == "StatefulSet":
            service = find(objects, "Service", governing)
            if governing not in services or not service["spec"].get("publishNotReadyAddresses"):
                continue
        for name in pod.names:
            ranks = [number for port, number in pod.ports.items() if re.fullmatch(r"rank-\d+", port)]
            found |= {f"{name}.{governing}:{port}": (name, port) for port in ranks}
    return found
