"""The pods of the manifests as processes: probes, a Load and a Forward, a killed container, the end."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from coordinator.client import Client, RequestError, Tls
from tests.deploy import kubelet
from tests.deploy.hosts import Hosts
from tests.deploy.kubelet import Container, Node, RunningPod
from tests.deploy.manifests import KUBERNETES, find, pods, render
from tests.deploy.model import FILE, NAME, Model
from tests.deploy.waiting import served, until

pytestmark = pytest.mark.timeout(180)
SERVICE = 50051


@dataclass
class Cluster:
    """A replica group and its coordinator, started as their manifests say."""

    ranks: RunningPod
    front: RunningPod
    model: Model
    client: Client
    certificates: Path | None

    @property
    def containers(self) -> list[Container]:
        return [*self.ranks.containers, *self.front.containers]

    def ready(self) -> None:
        for container in self.containers:
            until(lambda each=container: each.probe("readinessProbe"), f"{container.spec['name']} to be ready")


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    kubelet.skip_unless_possible()
    overlay, changes = request.param
    secure = overlay == "tls"
    directory = tmp_path_factory.mktemp("pods")
    models = tmp_path_factory.mktemp("models")
    models.chmod(0o755)
    model = Model(models)
    objects = render(_with_tls(directory) if secure else overlay)
    certificates = _certificates(tmp_path_factory.mktemp("tls"), objects) if secure else None
    with ExitStack() as stack:
        front_host, ranks_host = stack.enter_context(Hosts(2))
        node = stack.enter_context(Node(tmp_path_factory.mktemp("node")))
        names = {"shardd-0.shardd": ranks_host.address, "coordinator": front_host.address}
        given = {"models": models}
        if certificates:
            given |= {name: certificates / name for name in ("shardd-tls", "coordinator-tls")}
        made = {}
        for pod in pods(objects):
            name = pod.names[0] if pod.names else "coordinator-0"
            host = ranks_host if pod.names else front_host
            made[name] = RunningPod(node, host, name, objects, pod, names=names, given=given, changes=changes)
            made[name].start()
        client = Client(made["coordinator-0"].reach(SERVICE), **_trust(certificates))
        started = Cluster(made["shardd-0"], made["coordinator-0"], model, client, certificates)
        yield started
        for container in started.containers:  # shown if the test failed
            print(f"--- {container.log.name}\n{container.log.read_text(errors='replace')}")


def _trust(certificates: Path | None) -> dict:
    if certificates is None:
        return {}
    name = (("grpc.ssl_target_name_override", "coordinator"),)
    return {"tls": Tls(ca=certificates / "coordinator-tls" / "ca.crt"), "options": name}


def _with_tls(directory: Path) -> Path:
    """The cpu overlay with the TLS component: an overlay of one's own, as the guide says."""
    source = directory / "overlay"
    source.mkdir()
    relative = Path(*[".."] * len(source.resolve().parts[1:]), *KUBERNETES.parts[1:])
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization", "namespace: tensor-parallel"]
    lines += ["resources:", f"  - {relative}/overlays/cpu", "components:", f"  - {relative}/components/tls"]
    (source / "kustomization.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return source


def _certificates(directory: Path, objects: list) -> Path:
    """What cert-manager would make of the Certificates: one directory for each Secret."""

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], capture_output=True, timeout=20, check=True)

    authority = find(objects, "Certificate", "tensor-parallel-ca")["spec"]
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    ca, ca_key = directory / "ca.crt", directory / "ca.key"
    openssl("req", "-x509", *key, "-subj", f"/CN={authority['commonName']}", "-keyout", ca_key, "-out", ca)
    for name in ("coordinator", "shardd"):
        spec = find(objects, "Certificate", name)["spec"]
        secret = directory / spec["secretName"]
        secret.mkdir()
        names = ",".join(f"DNS:{each}" for each in spec["dnsNames"])
        uses = ",".join({"server auth": "serverAuth", "client auth": "clientAuth"}.get(u, "") for u in spec["usages"])
        signed = ("-CA", ca, "-CAkey", ca_key, "-subj", f"/CN={name}", "-addext", f"subjectAltName={names}")
        signed += ("-addext", f"extendedKeyUsage={uses.strip(',')}")
        openssl("req", "-x509", *key, *signed, "-keyout", secret / "tls.key", "-out", secret / "tls.crt")
        (secret / "ca.crt").write_bytes(ca.read_bytes())
        (secret / "tls.key").chmod(0o644)
        secret.chmod(0o755)
    directory.chmod(0o755)
    return directory


CONFINED = {"root": "ro", "Uid": "10001", "CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1"}
ON_CPU = {"--device=cuda": "--device=cpu"}


@pytest.mark.parametrize(
    "cluster",
    [("tls", {}), ("base", ON_CPU)],
    indirect=True,
    ids=["cpu with tls", "base without GPUs"],
)
def test_pods_serve_as_written(cluster: Cluster) -> None:
    for container in cluster.containers:
        container.started()
        assert container.probe("livenessProbe")
        assert container.confinement() == CONFINED
    # An empty service is ready: it can be asked to load.
    cluster.ready()
    until(lambda: _serving(cluster), "the group to form")
    cluster.client.load(NAME, FILE, timeout=120)
    cluster.model.check(cluster.client.forward(NAME, cluster.model.inputs, timeout=30))
    if cluster.certificates:
        _check_that_strangers_are_refused(cluster)

    else:
        _check_that_a_killed_container_is_enough(cluster)

    assert cluster.front.stop() == [0]
    assert cluster.ranks.stop() == [0] * len(cluster.ranks.containers)
    assert list(cluster.ranks.node.volume("shardd-0", "shm").iterdir()) == []
    for container in cluster.containers:
        assert "Traceback" not in container.log.read_text(errors="replace")


def _check_that_a_killed_container_is_enough(cluster: Cluster) -> None:
    """The kubelet restarts it, and no other."""
    killed = cluster.ranks.containers[-1]
    killed.kill(signal.SIGKILL)
    killed.wait(10)
    until(lambda: not _serving(cluster), "health to tell")
    assert cluster.front.containers[0].probe("readinessProbe")  # it goes on answering: UNAVAILABLE, with the reason
    killed.start()
    killed.started()
    print(
        f"container restarted to serving again: {served(cluster.client, cluster.model):.1f} s after its startup probe"
    )
    cluster.ready()


def _serving(cluster: Cluster) -> bool:
    try:
        return bool(cluster.client.health(timeout=5)["serving"])
    except RequestError:
        return False


def _check_that_strangers_are_refused(cluster: Cluster) -> None:
    """Plaintext on either port, and TLS without a certificate to a daemon; probes stay in plaintext."""
    rank = cluster.ranks.containers[0]
    with Client(cluster.front.reach(SERVICE)) as plain, pytest.raises(RequestError) as refused:
        plain.health(timeout=3)
    assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert not rank.healthy(7000, "liveness", 3)
    assert cluster.certificates is not None
    credentials = grpc.ssl_channel_credentials((cluster.certificates / "shardd-tls" / "ca.crt").read_bytes())
    options = [("grpc.ssl_target_name_override", "shardd")]
    with grpc.secure_channel(cluster.ranks.reach(7000), credentials, options) as channel:
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/tensor_parallel.v1.Shard/Status")(b"", timeout=3)
