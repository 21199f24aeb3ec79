"""A session: one generation's process group and its ordered channel, from Join until the last thread has let go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from shardd.errors import WrongState


class Endable(Protocol):
    """What a session needs of a channel: it can be closed from any thread, for a reason."""

    def close(self, reason: str) -> None: ...


class Abortable(Protocol):
    """What a session needs of a process group: any thread can end its collectives, one thread frees it."""

    @property
    def name(self) -> str: ...
    def abort(self, reason: str) -> None: ...
    def close(self) -> None: ...


class Session:
    """Owns ``backend`` (None for a single rank) and, once one is attached, the channel.

    Any thread may :meth:`end` it. The executor serves the channel and calls :meth:`release` when it has let go; a
    session that never had a channel is released by whoever ends it. Nothing of it is used after ``released`` is set.
    """

    def __init__(self, generation: int, owner: str, backend: Abortable | None, unbind: Callable[[], None]) -> None:
        self.generation = generation
        self.owner = owner
        self.released = threading.Event()
        self._backend = backend
        self._unbind = unbind
        self._lock = threading.Lock()
        self._channel: Endable | None = None
        self._reason: str | None = None

    @property
    def backend_name(self) -> str:
        return self._backend.name if self._backend is not None else "local"

    @property
    def reason(self) -> str | None:
        """Why the session ended; None while it lives."""
        return self._reason

    def attach(self, channel: Endable) -> None:
        """Make ``channel`` the session's, once. Raises :class:`WrongState` when it has one already or has ended."""
        with self._lock:
            if self._reason is not None:
                raise WrongState(f"generation {self.generation} has ended: {self._reason}")
            if self._channel is not None:
                raise WrongState(f"generation {self.generation} already has its channel")
            self._channel = channel

    def end(self, reason: str) -> None:
        """Abort what runs and close the channel. Idempotent; does not wait for ``released``.

        Raises what the backend raises when even aborting fails: then nothing but a new process helps.
        """
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            channel = self._channel
        try:
            if self._backend is not None:
                self._backend.abort(reason)
        finally:
            if channel is None:
                self.release()
            else:
                channel.close(reason)

    def release(self) -> None:
        """Free the process group. Called by the one thread that used it, after its last use."""
        self._unbind()
        if self._backend is not None:
            self._backend.close()
        self.released.set()
