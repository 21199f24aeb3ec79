"""Listens, and gives every request of every connection to a ``Call``."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import stat
from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from coordinator.http2.call import Call, Handler, Serving
from coordinator.http2.connection import Connection

BACKLOG = 1024
_NOT_HERE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # "localhost" is an IPv6 address too, even where there is no IPv6


class Server:
    """What a ``grpc.aio.Server`` without credentials is to the coordinator."""

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor], max_message_bytes: int) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._found: dict[str, Handler] = {}
        self._sockets: list[socket.socket] = []
        self._listening: list[asyncio.AbstractServer] = []
        self._serving = Serving(_chain(interceptors, self._find), max_message_bytes)
        self._connections: set[Connection] = set()
        self._all_closed = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """What generated code calls beside ``add_generic_rpc_handlers``, which has told the same."""

    async def _find(self, details: grpc.HandlerCallDetails) -> Handler | None:
        known = self._found.get(details.method)
        if known is not None:
            return known
        found = (handlers.service(details) for handlers in self._handlers)
        handler = next((handler for handler in found if handler is not None), None)
        if handler is not None:  # names that clients make up are not kept
            self._found[details.method] = handler
        return handler

    def add_insecure_port(self, address: str) -> int:
        """Binds ``host:port`` or ``unix:path``; the port, 1 for a path. Raises OSError."""
        if address.startswith("unix:"):
            self._sockets.append(_bound_path(address.removeprefix("unix:")))
            return 1
        bound = _bound(address)
        self._sockets += bound
        port: int = bound[0].getsockname()[1]
        return port

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for bound in self._sockets:
            create = loop.create_unix_server if bound.family == socket.AF_UNIX else loop.create_server
            self._listening.append(await create(self._connection, sock=bound, backlog=BACKLOG))

    def _connection(self) -> Connection:
        connection = Connection(lambda stream: Call(stream, self._serving).run(), self._left)
        self._connections.add(connection)
        self._all_closed.clear()
        return connection

    def _left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_closed.set()

    async def stop(self, grace: float | None) -> None:
        """No new connections or calls; the calls at work have ``grace`` seconds (None: none)."""
        for bound in self._sockets:
            _remove_path(bound)
        for listening in self._listening:
            listening.close()
        for connection in list(self._connections):
            connection.shut()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_closed.wait(), grace or 0.0)
        calls = [call for connection in self._connections for call in connection.calls]
        for connection in list(self._connections):
            connection.cut()
        await asyncio.gather(*calls, return_exceptions=True)


def _chain(interceptors: Sequence[grpc.aio.ServerInterceptor], find: Any) -> Any:
    """The first interceptor is asked first."""
    for interceptor in reversed(interceptors):
        find = functools.partial(interceptor.intercept_service, find)
    return find


def _bound(address: str) -> list[socket.socket]:
    """A socket for each address that the name stands for and this host has, all on one port. Raises OSError."""
    host, _, text = address.rpartition(":")
    port = int(text)
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    made: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, target in dict.fromkeys(found):
        try:
            made.append(_bound_one(family, kind, protocol, (target[0], port, *target[2:])))
            port = made[0].getsockname()[1]
        except OSError as error:
            if error.errno in _NOT_HERE:
                missing = error
                continue
            for one in made:
                one.close()
            raise
    if not made and missing is not None:
        raise missing
    return made


def _bound_one(family: int, kind: int, protocol: int, target: tuple[Any, ...]) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(target[0] != "::"))
        one.bind(target)
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _bound_path(path: str) -> socket.socket:
    """Takes over a path that nobody listens on any more. Raises OSError."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.setblocking(False)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
                os.unlink(path)
        one.bind(path)
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def _remove_path(bound: socket.socket) -> None:
    if bound.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            os.unlink(bound.getsockname())
