"""What a node runs, as child specs: N pinned daemons, and the coordinator where it is here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.supervisor.child import ChildSpec
from coordinator.supervisor.devices import cores, gpus


class ClusterError(ValueError):
    """The cluster cannot be what was asked for; the message is one line that says what to change."""


@dataclass(frozen=True, slots=True)
class Node:
    """This node's daemons. With ``listen`` HOST:PORT, rank i of the node listens on PORT+i; else on private sockets. So
    with ``metrics_listen``; else without metrics.

    ``spare``: keep a process of which ranks are made (None: where they run on the CPU). ``rank_offset`` is the first
    daemon's rank and ``world_size`` the number of ranks on all nodes (0: ``ranks``).
    """

    ranks: int
    device: str = "auto"
    model_root: Path | None = None
    allow_factory: tuple[str, ...] = ()
    allow_shared_gpu: bool = False
    threads: int = 0
    listen: str = ""
    rank_offset: int = 0
    world_size: int = 0
    advertise: str = ""
    interface: str = ""
    metrics_listen: str = ""
    backend: str = ""
    drain_seconds: float = 30.0
    log_dir: Path | None = None
    log_level: str = ""
    spare: bool | None = None


@dataclass(frozen=True, slots=True)
class Front:
    """The coordinator of a local cluster. ``port`` 0 is the kernel's choice, kept across restarts."""

    host: str = "127.0.0.1"
    port: int = 50051
    state_dir: Path | None = None
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_seconds: float = 30.0


def daemons(node: Node, directory: Path) -> list[ChildSpec]:
    """Raises ClusterError: no such model root, more ranks than GPUs."""
    if node.model_root is not None and not node.model_root.is_dir():
        raise ClusterError(f"--model-root: {str(node.model_root)!r} is not a directory")
    world = node.world_size or node.ranks
    if node.rank_offset + node.ranks > world:
        raise ClusterError(f"--rank-offset: ranks up to {node.rank_offset + node.ranks - 1} do not fit in {world}")
    pins = _pins(node)
    threads = _threads(node)
    spare = not pins if node.spare is None else node.spare
    specs = []
    for local in range(node.ranks):
        rank = node.rank_offset + local
        health = f"unix:{directory}/rank{rank}.health"
        argv = ["--rank", str(rank), "--world-size", str(world), *threads]
        argv += ["--local-rank", str(local), "--local-ranks", str(node.ranks)]
        argv += ["--listen", daemon_address(node, directory, local), "--health-listen", health]
        argv += ["--device", "cuda" if pins else "cpu", "--drain-seconds", f"{node.drain_seconds:g}"]
        argv += ["--metrics-listen", _port_after(node.metrics_listen, local)] if node.metrics_listen else []
        argv += _flags(node, shared=len(set(pins)) < len(pins))
        environment = dict(os.environ)
        if pins:
            # By device visibility and never by a device cgroup: NCCL must be able to open its peers' devices.
            environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": pins[local]}
        specs.append(
            ChildSpec(
                name=f"rank {rank}",
                argv=lambda argv=argv: [*_program("shardd"), *argv],  # type: ignore[misc]
                rank_arguments=argv if spare else (),
                health=health,
                environment=environment,
                stop_seconds=node.drain_seconds + 5,
                log_file=node.log_dir / f"rank{rank}.log" if node.log_dir else None,
            )
        )
    return specs


def daemon_address(node: Node, directory: Path, local: int) -> str:
    if not node.listen:
        return f"unix:{directory}/rank{node.rank_offset + local}.sock"
    return _port_after(node.listen, local)


def _port_after(address: str, local: int) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + local}"


def coordinator(front: Front, node: Node, directory: Path) -> ChildSpec:
    """The coordinator of ``node``'s daemons; its address is in `port_file` once it listens."""
    health = f"unix:{directory}/coordinator.health"
    shards = [daemon_address(node, directory, local) for local in range(node.ranks)]
    # Without a directory of the user's, what is loaded is at least remembered across the coordinator's own restarts.
    state = front.state_dir or directory / "state"

    def argv() -> list[str]:
        address = read_port_file(directory) or f"{front.host}:{front.port}"
        found = [*_program("coordinator"), "--listen", address, "--port-file", str(port_file(directory))]
        found += ["--health-listen", health, "--state-dir", str(state)]
        found += ["--drain-seconds", f"{front.drain_seconds:g}"]
        for flag, value in (("token-file", front.token_file), ("tls-cert", front.tls_cert), ("tls-key", front.tls_key)):
            found += [f"--{flag}", str(value)] if value else []
        for shard in shards:
            found += ["--shard", shard]
        return found + (["--log-level", node.log_level] if node.log_level else [])

    return ChildSpec(
        name="coordinator",
        argv=argv,
        health=health,
        liveness="coordinator",
        readiness="coordinator",
        stop_seconds=front.drain_seconds + 5,
        log_file=node.log_dir / "coordinator.log" if node.log_dir else None,
    )


def port_file(directory: Path) -> Path:
    return directory / "coordinator.port"


def read_port_file(directory: Path) -> str:
    """The coordinator's address; empty before it has listened. One that ends in order takes its file with it, and its
    successor is to have the same address: so what was read once is kept."""
    kept = directory / "coordinator.address"
    try:
        address = port_file(directory).read_text().strip()
    except FileNotFoundError:
        return kept.read_text() if kept.exists() else ""
    kept.write_text(address)
    return address


def _program(name: str) -> Sequence[str]:
    # By module, with this interpreter: found in any environment, whatever PATH says.
    return (sys.executable, "-m", f"{name}.main")


def _pins(node: Node) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each rank; empty on the CPU."""
    if node.device == "cpu":
        return []
    found = gpus()
    if not found and node.device == "auto":
        return []
    if not found:
        raise ClusterError("--device cuda: no GPU was found here (is the NVIDIA driver loaded?); try --device cpu")
    if node.ranks > len(found) and not node.allow_shared_gpu:
        raise ClusterError(
            f"--ranks {node.ranks} needs as many GPUs, but {len(found)} can be used here; "
            f"use --ranks {len(found)}, --device cpu, or --allow-shared-gpu"
        )
    return [found[local % len(found)] for local in range(node.ranks)]


def _threads(node: Node) -> list[str]:
    """A fair share of the cores, unless it was said otherwise."""
    if not node.threads and os.environ.get("SHARDD_THREADS"):
        return []
    return ["--threads", str(node.threads or max(1, cores() // node.ranks))]


def _flags(node: Node, *, shared: bool) -> list[str]:
    flags = ["--model-root", str(node.model_root)] if node.model_root else []
    for factory in node.allow_factory:
        flags += ["--allow-factory", factory]
    given = (
        ("advertise", node.advertise),
        ("interface", node.interface),
        ("backend", node.backend or ("gloo" if shared else "")),  # NCCL refuses several ranks on one GPU
        ("log-level", node.log_level),
    )
    for flag, value in given:
        flags += [f"--{flag}", value] if value else []
    return [*flags, "--allow-shared-gpu"] if node.allow_shared_gpu else flags
