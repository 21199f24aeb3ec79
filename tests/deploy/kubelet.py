"""What a kubelet does with a pod, without a cluster: its containers as processes, exactly as the manifest says.

Each container gets the manifest's command, arguments, environment, volumes, user, capabilities and read-only root, in
namespaces as a container's; the containers of a pod share a network with the pod's address and the manifest's ports.
Names are resolved as the cluster's DNS would. Stand-ins: the image is this host's root with this checkout in
/opt/tensor-parallel, and claims are directories.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy import hosts, installed
from tests.deploy.hosts import Host
from tests.deploy.manifests import ROOT, Object, Pod, settings

USER = "10001"
# Arguments: root, user, then triples (source, place, options) up to "--", then the command.
_CONTAINER = """
set -eu
root=$1 user=$2; shift 2
mount --rbind /dev "$root/dev"; mount -t tmpfs -o size=64m tmpfs "$root/dev/shm"; mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
    mount --bind "$1" "$root$2"; [ "$3" = rw ] || mount -o remount,bind,"$3" "$root$2"; shift 3
done
shift
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --inh-caps=-all \
    --bounding-set=-all --pdeathsig KILL -- env -i "$@"
"""


def skip_unless_possible() -> None:
    hosts.skip_unless_possible()
    missing = [program for program in ("unshare", "setpriv", "chroot", "mount") if not shutil.which(program)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no overlay file system")


def image_environment(name: str) -> dict[str, str]:
    """ENV of the last stage of a Containerfile; its PATH comes before the usual one."""
    text = (ROOT / "deploy/image" / f"Containerfile.{name}").read_text(encoding="utf-8").replace("\\\n", " ")
    last = text[text.rindex("FROM ") :]
    pairs = dict(pair.split("=", 1) for line in re.findall(r"^ENV (.*)$", last, re.M) for pair in line.split())
    return pairs | {"PATH": pairs["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin")}


class Node:
    """Where pods run: the image, and the volumes. A context manager: its mounts end with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Node:
        with contextlib.ExitStack() as stack:
            _call("mount", "-t", "tmpfs", "-o", "size=2g,mode=0755", "tmpfs", str(self.directory))
            stack.callback(_call, "umount", "--lazy", str(self.directory))
            for name in ("upper", "work", "root", "volumes"):
                (self.directory / name).mkdir()
            layers = f"lowerdir=/,upperdir={self.directory}/upper,workdir={self.directory}/work"
            _call("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
            stack.callback(_call, "umount", "--lazy", str(self.root))
            installed.environment(self.root)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def volume(self, owner: str, name: str) -> Path:
        path = self.directory / "volumes" / f"{owner}-{name}"
        if not path.exists():
            path.mkdir()
            shutil.chown(path, int(USER), int(USER))
        return path

    def mountpoint(self, place: str) -> None:
        (self.root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)


class Container:
    """One container of a running pod; `start` again after it ended is what restartPolicy Always does."""

    def __init__(self, running: RunningPod, spec: Object) -> None:
        self.spec = spec
        self._running = running
        self._process: subprocess.Popen[bytes] | None = None
        self.log = running.node.directory / f"{running.name}-{spec['name']}.log"

    def start(self) -> None:
        running = self._running
        command = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            _CONTAINER,
            "sh",
            str(running.node.root),
            USER,
        ]
        for source, place, options in self._mounts():
            command += [source, place, options]
        environment = [f"{name}={value}" for name, value in self._environment().items()]
        with self.log.open("ab") as output:
            self._process = running.host.popen(*command, "--", *environment, *self._command(), output=output)

    def _mounts(self) -> Iterator[tuple[str, str, str]]:
        node, pod = self._running.node, self._running.pod
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        places = [(str(source), place, "ro") for source, place in installed.bindings().items()]
        for mount in self.spec["volumeMounts"]:
            volume = volumes[mount["name"]]
            claimed = volume.get("persistentVolumeClaim", {}).get("claimName")
            secret = volume.get("secret", {}).get("secretName")
            source = self._running.given.get(claimed or secret) or node.volume(self._running.name, mount["name"])
            places.append((str(source), mount["mountPath"], "ro" if mount.get("readOnly") else "rw"))
        for _, place, _ in places:
            node.mountpoint(place)
        yield from places
        yield str(self._running.hosts_file), "/etc/hosts", "ro"

    def _environment(self) -> dict[str, str]:
        """The image's, then the config maps', then the manifest's own."""
        image = "coordinator" if self.spec["command"] == ["coordinator"] else "cpu"
        found = image_environment(image) | installed.ENVIRONMENT | settings(self._running.objects, self.spec)
        return found | self._fields()

    def _fields(self) -> dict[str, str]:
        """Values that the kubelet takes from the pod."""
        running = self._running
        known = {
            "status.podIP": running.host.address,
            "metadata.labels['apps.kubernetes.io/pod-index']": running.name.rpartition("-")[2],
        }
        items = [item for item in self.spec.get("env", []) if "valueFrom" in item]
        return {item["name"]: known[item["valueFrom"]["fieldRef"]["fieldPath"]] for item in items}

    def _command(self) -> list[str]:
        variables = self._environment()
        words = [*self.spec["command"], *self.spec["args"]]
        return [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], self._running.changed(word)) for word in words]

    # ---- while it runs

    @property
    def pid(self) -> int:
        """Of the container's first process, as this host numbers it."""
        assert self._process is not None
        (child,) = psutil.Process(self._process.pid).children()
        return child.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def confinement(self) -> dict[str, str]:
        """What the kernel holds its first process to."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        found = {key: value.split()[0] for key, value in (line.split(":", 1) for line in lines) if value.strip()}
        mounts = Path(f"/proc/{self.pid}/mounts").read_text(encoding="ascii").splitlines()
        root = next(line.split()[3] for line in mounts if line.split()[1] == "/")
        return {"root": root.split(",")[0], **{key: found[key] for key in ("Uid", "CapEff", "CapBnd", "NoNewPrivs")}}

    def kill(self, number: signal.Signals) -> None:
        psutil.Process(self.pid).send_signal(number)

    def wait(self, seconds: float) -> int:
        assert self._process is not None
        return self._process.wait(seconds)

    def probe(self, kind: str) -> bool:
        """One gRPC probe as the kubelet makes it: from outside, to the pod's address, in plaintext."""
        probe = self.spec[kind]
        return self.healthy(probe["grpc"]["port"], probe["grpc"].get("service", ""), probe.get("timeoutSeconds", 1))

    def healthy(self, port: int, service: str, seconds: float) -> bool:
        with grpc.insecure_channel(self._running.reach(port)) as channel:
            try:
                request = health_pb2.HealthCheckRequest(service=service)
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=seconds)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def started(self) -> None:
        """Returns when the startup probe has succeeded; AssertionError when the kubelet would have given up."""
        probe = self.spec["startupProbe"]
        deadline = time.monotonic() + probe["failureThreshold"] * probe["periodSeconds"]
        while not self.probe("startupProbe"):
            text = self.log.read_text(errors="replace")
            assert self.running, f"{self.spec['name']} ended: {text}"
            assert time.monotonic() < deadline, f"{self.spec['name']}: startup probe failed: {text}"
            time.sleep(0.1)


class RunningPod:
    """A pod on ``host``.

    ``names`` are the cluster's, with their addresses. ``given`` are directories for claims and secrets. ``changes``
    replace words of the command, where this machine has not what the manifest asks for.
    """

    def __init__(
        self,
        node: Node,
        host: Host,
        name: str,
        objects: list[Object],
        pod: Pod,
        *,
        names: Mapping[str, str],
        given: Mapping[str, Path],
        changes: Mapping[str, str],
    ) -> None:
        self.node, self.host, self.name, self.objects, self.pod, self.given = node, host, name, objects, pod, given
        self._changes = changes
        self._relays: dict[int, str] = {}
        self.hosts_file = node.directory / f"{name}.hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {each}" for each, address in names.items())]
        self.hosts_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.containers = [Container(self, spec) for spec in pod.containers]

    def start(self) -> None:
        for container in self.containers:
            container.start()

    def changed(self, word: str) -> str:
        return self._changes.get(word, word)

    def reach(self, port: int) -> str:
        if port not in self._relays:
            self._relays[port] = self.host.reach(port)
        return self._relays[port]

    def stop(self) -> list[int]:
        """SIGTERM, and the exit codes; AssertionError if the grace period is not enough."""
        for container in self.containers:
            container.kill(signal.SIGTERM)
        return [container.wait(self.pod.spec["terminationGracePeriodSeconds"]) for container in self.containers]


def _call(*command: str) -> Any:
    return subprocess.run(command, capture_output=True, timeout=30, check=True)
