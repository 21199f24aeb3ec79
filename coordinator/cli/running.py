"""A supervised cluster in the foreground: start, wait until it serves, load, tell, wait for the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.cli.failures import USAGE, Failure
from coordinator.cli.models import loading
from coordinator.cli.settings import Settings, read_token
from coordinator.client import AsyncClient, RequestError, Tls
from coordinator.client.sync import LOAD_TIMEOUT
from coordinator.logging import configure, get_logger
from coordinator.supervisor import StartError, Supervisor
from coordinator.supervisor.cluster import ClusterError, Front, Node, coordinator, daemons, read_port_file

# A Unix socket's path holds 107 bytes at most; ours ends in "/coordinator.health".
_LONGEST_DIRECTORY = 80
_FORMING = 180.0  # seconds until the ranks are a group


@dataclass
class Running:
    """A cluster that serves."""

    target: str
    supervisor: Supervisor
    models: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        pids = {child.spec.name: child.pid for child in self.supervisor.children}
        ranks = [{"rank": int(name.split()[1]), "pid": pid} for name, pid in pids.items() if name.startswith("rank ")]
        return {
            "ready": True,
            "target": self.target,
            "pid": os.getpid(),
            "coordinator": {"pid": pids.get("coordinator")},
            "ranks": ranks,
            "models": self.models,
        }


async def run(
    node: Node,
    front: Front | None,
    models: Sequence[tuple[str, str]],
    settings: Settings,
    ready: Callable[[Running], None],
) -> None:
    """Runs until SIGINT, SIGTERM or SIGHUP; a second one kills at once. ``ready`` is called once the cluster serves.

    Raises Failure with the right exit code when the cluster cannot start.
    """
    configure(node.log_level or "info", component="supervisor")
    directory = _private_directory()
    try:
        supervisor = _supervisor(node, front, directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    stop = asyncio.Event()

    def asked_to_stop() -> None:
        if stop.is_set():
            supervisor.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop)
    try:
        await _first(stop, _serve(supervisor, directory, front, models, settings, ready))
    finally:
        get_logger().info("draining")
        await supervisor.stop()
        get_logger().info("stopped")


def _private_directory() -> Path:
    """For sockets and state: ours alone (mode 0700)."""
    directory = Path(tempfile.mkdtemp(prefix="shardctl-"))
    if len(os.fsencode(directory)) > _LONGEST_DIRECTORY:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="shardctl-", dir="/tmp"))
    return directory


def _supervisor(node: Node, front: Front | None, directory: Path) -> Supervisor:
    try:
        stages = [daemons(node, directory)]
        if front is not None:
            _check_free(front)
            stages.append([coordinator(front, node, directory)])
    except ClusterError as error:
        raise Failure(str(error), USAGE) from None
    return Supervisor(stages, directory)


def _check_free(front: Front) -> None:
    """Says so before anything is started; the coordinator itself finds out only after seconds."""
    family = socket.AF_INET6 if ":" in front.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((front.host, front.port))
        except OSError as error:
            hint = "choose another with --port, or --port 0 for any free one"
            raise Failure(f"cannot listen on {front.host}:{front.port}: {error.strerror}", USAGE, hint) from None


async def _first(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Until either is over; an error of ``work`` is raised."""
    tasks = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


async def _serve(
    supervisor: Supervisor,
    directory: Path,
    front: Front | None,
    models: Sequence[tuple[str, str]],
    settings: Settings,
    ready: Callable[[Running], None],
) -> None:
    try:
        await supervisor.start()
    except StartError as error:
        raise Failure(str(error), error.code, "its own message is above") from None
    running = Running("", supervisor)
    if front is not None:
        running.target = _reachable(read_port_file(directory))
        async with _client(running.target, front) as client:
            await until_serving(client)
            await _load(client, models, quiet=bool(settings.json))
            running.models = await client.models()
    ready(running)
    await supervisor.wait()


def _reachable(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "::") else address


def _client(target: str, front: Front) -> AsyncClient:
    tls = Tls(ca=front.tls_cert) if front.tls_cert is not None else None
    return AsyncClient(target, token=read_token(front.token_file), tls=tls, retries=True)


async def until_serving(client: AsyncClient) -> None:
    """Raises Failure with the last reason if the ranks do not form a group, or models of the last time do not load."""
    bound, started = _FORMING, time.monotonic()
    reason = "the coordinator does not answer"
    while time.monotonic() - started < bound:
        with contextlib.suppress(RequestError):
            health = await client.health(timeout=2)
            if health["serving"]:
                return
            reason = health["reason"]
            # The group is there; what is missing are models, whose weights take the time they take.
            bound = LOAD_TIMEOUT if health["coordinator"]["state"] == "READY" else _FORMING
        await asyncio.sleep(0.05)
    raise Failure(f"not serving after {bound:.0f} s: {reason}", hint="the logs above say more")


async def _load(client: AsyncClient, models: Sequence[tuple[str, str]], *, quiet: bool) -> None:
    restored = {(model["name"], model["path"]) for model in await client.models()}
    for name, path in models:
        if (name, path) in restored:
            continue  # came back by itself, from --state-dir
        with loading(name, quiet=quiet) as progress:
            try:
                await client.load(name, path, progress=progress)
            except RequestError as error:
                raise Failure(f"cannot load {name}={path}: {error.details()}") from None
