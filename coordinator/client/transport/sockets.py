"""The sockets of a client, so that one thread can end what others wait for, and a forked child lets go of them all."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref


class Sockets:
    """Safe to share between threads, and across a fork: nothing is ever locked. Every step is one operation on a set,
    which the interpreter does not interrupt."""

    def __init__(self) -> None:
        self.closed = False
        self._open: set[socket.socket] = set()
        _ALL.add(self)

    def open(self, family: int) -> socket.socket:
        """Not connected, and non-blocking."""
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        self._open.add(made)
        return made

    def close(self, one: socket.socket) -> None:
        self._open.discard(one)
        one.close()

    def shut(self) -> None:
        """Whoever waits on one finds it closed; so does who waits from now on, by ``closed``."""
        self.closed = True
        for one in self._open.copy():
            with contextlib.suppress(OSError):  # not connected yet, or not any more
                one.shutdown(socket.SHUT_RDWR)

    def forked(self) -> None:
        """In the child: closes its copies, of which the connections of the parent take no notice."""
        mine, self._open = self._open, set()
        for one in mine:
            one.close()

    def __del__(self) -> None:
        for one in self._open:
            one.close()


_ALL: weakref.WeakSet[Sockets] = weakref.WeakSet()


def _forked() -> None:
    for sockets in list(_ALL):
        sockets.forked()


os.register_at_fork(after_in_child=_forked)
