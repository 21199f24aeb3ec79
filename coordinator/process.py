"""The life of the process: start, serve, drain, leave. Imports no torch, so a restart takes a fraction of a second."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator

from coordinator import systemd
from coordinator.config import Config, ConfigError
from coordinator.core import Core
from coordinator.desired import DesiredState
from coordinator.logging import get_logger
from coordinator.metrics import Metrics, MetricsServer
from coordinator.server import Server, identity, write_port_file
from coordinator.tracing import from_environment
from coordinator.version import version

FAREWELL = 1.0  # seconds for the last answers to leave


async def serve(config: Config) -> int:
    """Until SIGTERM or SIGINT; the exit status. Raises ConfigError for whatever stops the start."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log = get_logger()
    desired = DesiredState(config.state_dir)
    server = Server(config)
    metrics = Metrics(version=version())
    exporter = _exporter(config, metrics)
    core = Core(config, metrics, desired, identity(server.address))
    # Only now: whoever cannot start as told says that alone.
    log.info("starting", pid=os.getpid(), ranks=config.world_size, listen=config.listen)
    tracing = from_environment()
    await server.start(core, tracing)
    core.start()
    if config.port_file is not None:
        write_port_file(config.port_file, server.address)
    log.info(
        "listening",
        address=server.address,
        health=server.health_address,
        metrics=exporter.address if exporter is not None else None,
    )
    gc.collect()
    gc.freeze()  # modules and servants stay; looking at them again would hold up requests for 11 ms each time
    async with _told_to_systemd():
        await stop.wait()
    await core.drain(config.drain)
    await core.stop()
    await server.stop(FAREWELL)
    await asyncio.to_thread(tracing.close)
    if exporter is not None:
        exporter.close()
    if config.port_file is not None:
        config.port_file.unlink(missing_ok=True)
    log.info("stopped")
    return 0


@contextlib.asynccontextmanager
async def _told_to_systemd() -> AsyncIterator[None]:
    """Up while the block runs, stopping after it."""
    keeper = asyncio.create_task(systemd.ready())
    try:
        yield
    finally:
        keeper.cancel()
        systemd.notify("STOPPING=1")


def _exporter(config: Config, metrics: Metrics) -> MetricsServer | None:
    if config.metrics_listen is None:
        return None
    host, _, port = config.metrics_listen.rpartition(":")
    try:
        return MetricsServer(metrics, host.strip("[]"), int(port))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--metrics-listen {config.metrics_listen} cannot be bound: {error}") from None
