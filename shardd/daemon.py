"""The daemon's life: listen at once, then import torch, serve until told to stop, drain, leave."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import threading
import time
from concurrent.futures import Future
from types import FrameType
from typing import TYPE_CHECKING

import grpc

from shardd import environment, systemd
from shardd.addresses import write_port_file
from shardd.config import Config
from shardd.generation import Generations, State
from shardd.health import Health
from shardd.identity import Identity
from shardd.logging import Logger
from shardd.metrics import Metrics
from shardd.models import Models
from shardd.rendezvous import Rendezvous, reserve
from shardd.server import make_health_server, make_server
from shardd.service import Core, ShardService
from shardd.status import Board

if TYPE_CHECKING:
    from shardd.core import Built

KEEP_SECONDS = 1.0
SWITCH_SECONDS = 0.001
QUIET_SECONDS = 0.5
"""No forward for so long, two heartbeats, means that the coordinator has heard of the draining and sends no more."""
LEAVE_SECONDS = 5.0
HURRY_SECONDS = 0.2


class Daemon:
    """One rank. :meth:`run` is its whole life, on the main thread."""

    def __init__(self, config: Config, log: Logger) -> None:
        self._config = config
        self._log = log
        self._started = time.monotonic()
        self._signals = _Signals()
        self._health = Health()
        self._showing = threading.Lock()
        self._metrics = Metrics(config.rank)
        self._core: Future[Core] = Future()
        self._built: Built | None = None
        self._servers: list[grpc.Server] = []

    def run(self) -> None:
        """Serve until SIGTERM. Raises ``BindError`` or ``DeviceError`` when the daemon cannot start as told."""
        config = self._config
        self._rendezvous = reserve(config)
        self._board = Board(
            Identity(config.rank, config.world_size),
            Generations(changed=self._show_health),
            Models(self._metrics.forget),
            self._rendezvous.address,
        )
        try:
            self._listen()
            self._start_core(self._rendezvous)
            self._keep()
            self._drain()
        finally:
            self._close()
        self._log.info("stopped", seconds=round(time.monotonic() - self._started, 3))

    def _listen(self) -> None:
        """Answer Status and probes from now on."""
        config = self._config
        service = ShardService(self._board, self._core, self._log)
        server, address = make_server(config, service, self._health)
        self._servers.append(server)
        where = {"address": str(address)}
        if config.health_listen is not None:
            probes, health_address = make_health_server(config.health_listen, self._health)
            self._servers.append(probes)
            where["health"] = str(health_address)
        if config.metrics_listen is not None:
            self._metrics.watch(self._board.status)
            where["metrics"] = str(self._metrics.listen(config.metrics_listen))
        # Only now: whoever cannot start as told says that alone.
        self._log.info("starting", pid=os.getpid(), world_size=config.world_size, device=config.device)
        for each in self._servers:
            each.start()
        if config.port_file is not None:
            write_port_file(config.port_file, str(address))
        exposed = not address.is_unix and not address.host.startswith("127.") and address.host != "::1"
        if exposed and not (config.token or config.tls_client_ca):
            self._log.warning("unprotected", message="anyone who reaches this address can use it; see --token-file")
        self._log.info("listening", **where, store=self._board.store_address)

    def _start_core(self, rendezvous: Rendezvous) -> None:
        """Import torch and start the executor. What was allocated so far is kept out of later garbage collections."""
        config = self._config
        environment.prepare(
            os.environ, threads=config.threads, world_size=config.world_size, interface=config.interface
        )
        # While a model is being planned the executor waits this long for the interpreter after each blocking call;
        # with the usual 5 ms it would get a third of the turns that it gets so.
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.disable()
        from shardd.core import build

        self._built = build(config, self._board, rendezvous, self._metrics, self._log)
        gc.freeze()
        gc.enable()
        self._core.set_result(self._built.core)
        self._built.warm()
        systemd.notify("READY=1", f"STATUS=rank {config.rank} of {config.world_size}")
        assert self._board.device is not None
        self._log.info("ready", device=self._board.device.name, seconds=round(time.monotonic() - self._started, 3))

    def _keep(self) -> None:
        """Until the first signal: feed the service manager's watchdog for as long as the executor makes progress."""
        watchdog = systemd.watchdog_seconds()
        interval = KEEP_SECONDS if watchdog is None else min(KEEP_SECONDS, watchdog / 3)
        while not self._signals.wait(interval):
            self._show_health()
            if self._live():
                systemd.notify("WATCHDOG=1")

    def _live(self) -> bool:
        """Whether the executor makes progress; nothing but a new process helps when it does not."""
        return self._built is None or not self._built.progress.stuck(self._config.stuck_seconds)

    def _show_health(self) -> None:
        """Publish what is recorded, on any thread."""
        with self._showing:
            ready = self._board.generations.standing().state is State.READY and not self._board.draining
            self._health.show(live=self._live(), ready=ready)

    def _drain(self) -> None:
        """Let running work finish, refuse new work, leave the group so that peers need not wait for this rank."""
        assert self._built is not None
        self._board.draining = True
        self._show_health()
        systemd.notify("STOPPING=1")
        self._log.info("draining", limit_seconds=self._config.drain_seconds)
        self._built.loader.cancel_all()
        begun = time.monotonic()
        while self._in_use(time.monotonic() - begun) and not self._signals.wait(0.05, count=2):
            pass
        self._built.membership.leave(f"rank {self._config.rank} is shutting down", self._patience())

    def _patience(self) -> float:
        """How long to wait for each thing that ought to end at once; less if the operator is in a hurry."""
        return HURRY_SECONDS if self._signals.wait(0.0, count=2) else LEAVE_SECONDS

    def _in_use(self, waited: float) -> bool:
        assert self._built is not None
        if self._board.generations.standing().state is not State.READY or waited > self._config.drain_seconds:
            return False
        return waited < QUIET_SECONDS or self._built.progress.quiet_seconds() < QUIET_SECONDS

    def _close(self) -> None:
        for stopped in [server.stop(0.5) for server in self._servers]:
            stopped.wait(self._patience())
        self._health.close()
        self._metrics.close()
        if self._built is not None:
            self._built.engine.stop(self._patience())
        listen = self._config.listen
        if self._servers and listen.is_unix:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(listen.path)
        if self._servers and self._config.port_file is not None:
            self._config.port_file.unlink(missing_ok=True)


class _Signals:
    """SIGTERM and SIGINT, counted. A pipe, because a handler may not touch a lock that its own thread holds."""

    def __init__(self) -> None:
        self._count = 0
        self._receiver, self._sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._sender, b"!")

    def wait(self, seconds: float, count: int = 1) -> bool:
        """Whether ``count`` signals have come; waits ``seconds`` for the next one if not."""
        if self._count < count and select.select([self._receiver], [], [], seconds)[0]:
            os.read(self._receiver, 64)
        return self._count >= count
