"""A client's connections, of which idle ones are used again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import grpc

from coordinator.client.transport.address import Address, Place, connect
from coordinator.client.transport.deadline import Deadline
from coordinator.client.transport.failures import CallFailed, reason_of, unavailable
from coordinator.client.transport.link import Link
from coordinator.client.transport.session import Session
from coordinator.client.transport.sockets import Sockets

CONNECT_SECONDS = 20.0  # within which a server has to say that it speaks HTTP/2, as gRPC has it
MOST_IDLE = 32
IDLE_SECONDS = 60.0  # after which a connection that nobody needed is closed, when another one is given back


class Pool:
    """Safe to share between threads, and across a fork: no locks, as in `Sockets`."""

    def __init__(self, address: Address, fields: Iterable[tuple[str, str]]) -> None:
        self._address = address
        self._fields = tuple(fields)
        self._idle: list[tuple[float, Session]] = []  # since when; the latest is last
        self._sockets = Sockets()

    @property
    def closed(self) -> bool:
        return self._sockets.closed

    def take(self, deadline: Deadline, *, fresh: bool = False) -> Session:
        """A connection for one call: the one used last, unless it has to be ``fresh``. Raises CallFailed."""
        while not fresh:
            try:
                _, session = self._idle.pop()
            except IndexError:
                break
            if session.usable():
                return session
            self.drop(session)
        return self._connected(deadline)

    def give_back(self, session: Session) -> None:
        """After a call that has ended; it is closed if it is of no more use."""
        if not session.clean or len(self._idle) >= MOST_IDLE:
            self.drop(session)
            return
        now = time.monotonic()
        self._idle.append((now, session))
        if self._sockets.closed:
            self._empty()
        elif self._idle[0][0] < now - IDLE_SECONDS:
            with contextlib.suppress(IndexError):  # another thread was faster
                self.drop(self._idle.pop(0)[1])

    def drop(self, session: Session) -> None:
        self._sockets.close(session.link.socket)

    def close(self) -> None:
        """Calls that run lose their connections, of which ``closed`` tells the reason."""
        self._sockets.shut()
        self._empty()

    def _empty(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self.drop(self._idle.pop()[1])

    def _connected(self, deadline: Deadline) -> Session:
        """With the first of the server's addresses at which HTTP/2 is spoken. Raises CallFailed."""
        places = self._address.places(deadline, self._sockets)
        why = "there is none"
        for index, place in enumerate(places):
            soon = deadline.part(CONNECT_SECONDS, len(places) - index)
            name = self._address.name_of(place)
            try:
                return self._greeted(place, name, soon)
            except OSError as error:
                why = f"{name}: {reason_of(error)}"
            except CallFailed as error:
                deadline.remaining()  # raises where it is this one that has passed
                late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                why = f"{name}: it did not answer" if late else error.details()
        raise unavailable(f"failed to connect to all addresses; last error: {why}")

    def _greeted(self, place: Place, name: str, deadline: Deadline) -> Session:
        """Raises CallFailed, OSError."""
        made = self._sockets.open(place[0])
        try:
            connect(made, place[1], deadline, self._sockets)
            session = Session(Link(made, name), self._address.authority, self._fields)
            session.greet(deadline)
        except BaseException:
            self._sockets.close(made)
            raise
        return session
