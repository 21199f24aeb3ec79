"""Generations: which one this daemon is in, who owns it, and which session runs. Torch-free; safe from any thread.

``NOPG -> FENCED(g) -> READY(g) -> BROKEN(g)``, and from each of them to ``FENCED(g')`` with a larger ``g'``. A fence
is how a coordinator takes the daemon: it ends what runs, and from then on only that coordinator's commands of that
generation count. An owner keeps the daemon for as long as it renews its lease; until the lease has lapsed, nobody else
can fence. So of two coordinators that want the same ranks one wins, instead of each ending the other's generations.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from shardd.errors import InvalidRequest, Superseded, WrongState
from shardd.session import Session

MAX_LEASE_SECONDS = 60.0
ORPHAN_SHARE = 0.25
"""What is left of a lease when its owner's channel breaks: a living owner renews it in time, a dead one lets go."""


class State(StrEnum):
    NOPG = "NOPG"
    FENCED = "FENCED"
    READY = "READY"
    BROKEN = "BROKEN"


@dataclass(frozen=True)
class Standing:
    """The recorded state at one moment. ``owner`` is empty when there is none or its lease has lapsed."""

    state: State
    generation: int
    highest: int
    owner: str
    lease_seconds: float
    last_error: str
    """With the time when it happened: it may be long over."""


class Generations:
    """The state machine. ``clock`` is in seconds and monotonic; ``changed`` is called after every transition."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, changed: Callable[[], None] = lambda: None) -> None:
        self._clock = clock
        self._changed = changed
        self._lock = threading.Lock()
        self._state = State.NOPG
        self._generation = 0
        self._highest = 0
        self._owner = ""
        self._duration = 0.0
        self._expires = 0.0
        self._last_error = ""
        self._session: Session | None = None

    def standing(self) -> Standing:
        with self._lock:
            return self._standing()

    def renew(self, owner: str, seconds: float) -> None:
        """Prolong ``owner``'s lease. Nothing happens unless it is the owner, lapsed or not, or names nobody."""
        with self._lock:
            if owner and owner == self._owner:
                self._lease(owner, seconds)

    def check_owner(self, owner: str) -> None:
        """Raise :class:`Superseded` if a coordinator other than ``owner`` holds a live lease."""
        with self._lock:
            self._check_owner(owner)

    def fence(self, generation: int, owner: str, seconds: float) -> tuple[Standing, bool]:
        """Enter ``FENCED(generation)`` if allowed: the standing after it, and whether it was.

        The last :meth:`session` must then be ended.
        """
        if not owner:
            raise InvalidRequest("a fence names its owner")
        with self._lock:
            holder = self._live_owner()
            if generation <= self._highest or (holder and holder != owner):
                return self._standing(), False
            self._highest = self._generation = generation
            self._state = State.FENCED
            self._lease(owner, seconds)
            standing = self._standing()
        self._changed()
        return standing, True

    def check_fenced(self, generation: int, owner: str) -> None:
        """Raise unless ``owner`` may join ``generation`` now."""
        with self._lock:
            self._check_fenced(generation, owner)

    def ready(self, session: Session, owner: str, enter: Callable[[], None]) -> None:
        """``FENCED(g) -> READY(g)``, calling ``enter`` in the same step. Raises if a newer fence came meanwhile."""
        with self._lock:
            self._check_fenced(session.generation, owner)
            enter()
            self._state = State.READY
            self._session = session
            self._last_error = ""
        self._changed()

    def join_failed(self, generation: int, reason: str) -> None:
        """``FENCED(g) -> BROKEN(g)``."""
        with self._lock:
            if (self._state, self._generation) != (State.FENCED, generation):
                return
            self._state = State.BROKEN
            self._last_error = _dated(reason)
        self._changed()

    def running(self, generation: int, owner: str) -> Session:
        """The session of ``READY(generation)``, for ``owner`` to open a channel on. Raises if that is not the state."""
        with self._lock:
            self._check_owner(owner)
            if self._state is not State.READY or self._generation != generation or self._session is None:
                raise WrongState(f"generation {generation} is not ready here: {self._where()}")
            if owner != self._owner:
                raise Superseded(f"generation {generation} belongs to {self._owner}, not to {owner}")
            return self._session

    def broken(self, session: Session, reason: str) -> None:
        """``READY(g) -> BROKEN(g)``, if ``session`` is still the running one."""
        with self._lock:
            if self._session is not session or self._state is not State.READY:
                return
            self._state = State.BROKEN
            self._last_error = _dated(reason)
        self._changed()

    def orphaned(self, session: Session) -> None:
        """The owner's channel broke: let its lease lapse soon, unless it lives and renews it."""
        with self._lock:
            if self._session is session and self._state is State.READY:
                self._expires = min(self._expires, self._clock() + ORPHAN_SHARE * self._duration)

    def session(self) -> Session | None:
        """The last session that was READY; it may have ended, and may not yet have been released."""
        with self._lock:
            return self._session

    def note(self, error: str) -> None:
        """Remember the last thing that went wrong, for whoever asks for the status."""
        with self._lock:
            self._last_error = _dated(error)

    def _lease(self, owner: str, seconds: float) -> None:
        self._owner = owner
        self._duration = min(max(seconds, 0.0), MAX_LEASE_SECONDS)
        self._expires = self._clock() + self._duration

    def _live_owner(self) -> str:
        return self._owner if self._clock() < self._expires else ""

    def _check_owner(self, owner: str) -> None:
        holder = self._live_owner()
        if holder and holder != owner:
            raise Superseded(f"owned by {holder} at generation {self._highest}")

    def _check_fenced(self, generation: int, owner: str) -> None:
        self._check_owner(owner)
        if (self._state, self._generation) != (State.FENCED, generation) or owner != self._owner:
            raise WrongState(f"generation {generation} is not fenced by {owner or 'nobody'}: {self._where()}")

    def _where(self) -> str:
        return f"the daemon is {self._state}({self._generation})"

    def _standing(self) -> Standing:
        left = max(0.0, self._expires - self._clock())
        return Standing(self._state, self._generation, self._highest, self._live_owner(), left, self._last_error)


def _dated(error: str) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {error}"
