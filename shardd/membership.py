"""Fencing, joining and opening the channel: how this rank leaves one generation and enters the next."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from protos.tensor_parallel.v1 import shard_pb2
from shardd.channel import Channel, StreamChannel
from shardd.engine import Engine
from shardd.errors import EXIT_STUCK, InvalidRequest, judge
from shardd.generation import Generations
from shardd.local_channel import LocalDoor
from shardd.logging import Logger
from shardd.models import Models
from shardd.session import Session
from tensor_parallel.backends import form_backend
from tensor_parallel.errors import CollectiveError
from tensor_parallel.group import Group

if TYPE_CHECKING:
    from tensor_parallel.group import Backend

MIN_JOIN_SECONDS = 0.1
MAX_JOIN_SECONDS = 300.0
COLLECTIVE_SECONDS = 120.0
"""Bound of one collective. A peer that dies is noticed at once, and when one hangs the coordinator fences in seconds;
this is for a rank that has lost its peers and its coordinator, and longer than a forward that one would wait for."""


class Membership:
    """This rank's place among its peers. Methods are called by RPC threads, several at once."""

    def __init__(
        self,
        *,
        group: Group,
        device: torch.device,
        backend: str,
        host: str,
        generations: Generations,
        models: Models,
        engine: Engine,
        log: Logger,
        fence_seconds: float,
    ) -> None:
        self._group = group
        self._device = device
        self._backend = backend
        self._host = host
        self._generations = generations
        self._models = models
        self._engine = engine
        self._log = log
        self._fence_seconds = fence_seconds
        self._lock = threading.Lock()
        self._forming: dict[int, Backend] = {}

    def fence(self, request: shard_pb2.FenceRequest) -> shard_pb2.FenceResponse:
        """End what runs, so that nothing of an older generation can block or write after this has returned."""
        owner, generation = request.lease.owner, request.generation
        started = time.monotonic()
        standing, accepted = self._generations.fence(generation, owner, request.lease.duration_milliseconds / 1000)
        if accepted:
            why = f"fenced by {owner} for generation {generation}: {request.reason}"
            self._end_last(why)
            self._end_forming(generation, why)
            seconds = round(time.monotonic() - started, 4)
            self._log.info("fence", generation=generation, owner=owner, reason=request.reason, seconds=seconds)
        else:
            self._log.info("superseded", generation=generation, refused=owner, by=standing.owner)
        return shard_pb2.FenceResponse(
            accepted=accepted,
            owner=standing.owner,
            highest_generation=standing.highest,
            lease_milliseconds=int(1000 * standing.lease_seconds),
        )

    def _end_last(self, reason: str) -> None:
        """End the last session and wait until nobody uses it any more; a process that cannot let go is given up."""
        session = self._generations.session()
        if session is None:
            return
        try:
            session.end(reason)
        except CollectiveError as error:
            self._give_up(session.generation, error=str(error))
        if not session.released.wait(self._fence_seconds):
            self._give_up(session.generation, seconds=self._fence_seconds)

    def _give_up(self, generation: int, **why: object) -> NoReturn:
        self._log.critical("executor_stuck", generation=generation, **why)
        os._exit(EXIT_STUCK)

    def _end_forming(self, generation: int, reason: str) -> None:
        """Abort groups that were still being formed when ``generation`` was fenced: on a GPU their kernels would wait
        for ever, and the next generation's behind them."""
        with self._lock:
            stale = [self._forming.pop(older) for older in list(self._forming) if older < generation]
        for backend in stale:
            try:
                backend.abort(reason)
            except CollectiveError as error:
                self._give_up(generation, error=str(error))

    def join(self, request: shard_pb2.JoinRequest) -> shard_pb2.JoinResponse:
        """Form generation ``request.generation`` with the peers and prove it. Raises if it cannot be, or may not be.

        Runs on the RPC's thread, not the executor's: one that hangs because a peer died can then be left behind by the
        next generation. It can no longer enter this daemon's state, and its keys in the store are nobody else's.
        """
        generation, owner = request.generation, request.owner
        self._generations.check_fenced(generation, owner)
        self._end_last(f"generation {generation} is being joined")
        started = time.monotonic()
        try:
            self._models.join(request.models)
            backend = self._form(request)
            session = Session(generation, owner, backend, self._group.unbind)
            self._enter(session, backend)
        except Exception as error:
            reason = judge(error).message
            self._generations.join_failed(generation, reason)
            self._log.warning("join_failed", generation=generation, error=reason)
            raise
        finally:
            with self._lock:
                self._forming.pop(generation, None)
        name, seconds = session.backend_name, round(time.monotonic() - started, 4)
        self._log.info("generation_ready", generation=generation, backend=name, owner=owner, seconds=seconds)
        return shard_pb2.JoinResponse(backend=name)

    def _enter(self, session: Session, backend: Backend | None) -> None:
        try:
            self._generations.ready(session, session.owner, lambda: self._bind(backend))
        except Exception:
            if backend is not None:
                backend.abort("a newer generation was fenced while this one was formed")
                backend.close()
            raise

    def _bind(self, backend: Backend | None) -> None:
        if backend is not None:
            self._group.bind(backend)

    def _form(self, request: shard_pb2.JoinRequest) -> Backend | None:
        size = self._group.world_size
        if size == 1:
            return None
        seconds = min(max(request.timeout_milliseconds / 1000, MIN_JOIN_SECONDS), MAX_JOIN_SECONDS)
        store = connect_store(request.store_address, seconds)
        return form_backend(
            self._backend,
            store=PrefixStore(f"g{request.generation}", store),
            rank=self._group.rank,
            world_size=size,
            device=self._device,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            host=self._host,
            connected=lambda backend: self._connected(request.generation, backend),
        )

    def _connected(self, generation: int, backend: Backend) -> None:
        with self._lock:
            self._forming[generation] = backend

    def open_stream(self, generation: int, owner: str) -> StreamChannel:
        """The running generation's channel over a gRPC stream, already served by the executor."""
        channel = StreamChannel(generation)
        self.open(generation, owner, channel)
        return channel

    def open_local(self, generation: int, owner: str) -> shard_pb2.OpenLocalChannelResponse:
        """Where to connect for the running generation's channel over a Unix socket; opened when that happens."""
        self._generations.running(generation, owner)
        door = LocalDoor(
            generation,
            lambda channel, opened: self.open(generation, owner, channel, opened),
            device=self._device,
            log=self._log,
        )
        return door.announce()

    def open(self, generation: int, owner: str, channel: Channel, opened: Callable[[], None] = lambda: None) -> None:
        """Make ``channel`` the running generation's, call ``opened``, and let the executor serve it."""
        session = self._generations.running(generation, owner)
        session.attach(channel)
        opened()
        self._engine.serve(session, channel)

    def leave(self, reason: str, seconds: float) -> None:
        """End the running generation for good: the daemon is going away."""
        session = self._generations.session()
        if session is not None:
            self._generations.broken(session, reason)
            session.end(reason)
            session.released.wait(seconds)


def serve_store(listener: socket.socket) -> Store:
    """The rendezvous store of this daemon, on a socket bound beforehand; it lives as long as the daemon."""
    host, port = listener.getsockname()[:2]
    timeout = timedelta(seconds=5)
    return TCPStore(host, port, None, True, timeout, False, master_listen_fd=listener.detach())


def connect_store(address: str, seconds: float) -> Store:
    """Rank 0's store. Raises :class:`InvalidRequest` for an address that is none, RuntimeError when it is silent."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidRequest(f"the store's address {address!r} is not HOST:PORT")
    return TCPStore(host, int(port), None, False, timedelta(seconds=seconds), False)
