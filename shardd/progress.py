"""What the executor is doing and since when, recorded so that others can tell slow from hung without asking it."""

from __future__ import annotations

import time
from collections.abc import Callable

NEVER_MILLISECONDS = 2**32 - 1


class Progress:
    """Written by the executor, read by any thread.

    ``collective_seconds`` gives the seconds spent in completed collectives so far: whenever it has grown, a collective
    has completed. ``begun`` gives how many have begun. Reading them on each sample costs the executor nothing per
    collective.
    """

    def __init__(
        self,
        collective_seconds: Callable[[], float],
        begun: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = collective_seconds
        self._begun = begun
        self._begun_before = 0
        self._clock = clock
        self._seen = collective_seconds()
        self._collective: float | None = None
        self._busy_since: float | None = None
        self._last_forward = clock()
        self.executed = 0

    def restart(self) -> None:
        """A new generation begins."""
        self.executed = 0
        self._begun_before = self._begun()

    def collectives(self) -> int:
        """How many have begun in this generation."""
        return self._begun() - self._begun_before

    def begin(self) -> None:
        """The executor starts a command."""
        self._busy_since = self._clock()

    def finish(self, *, forward: bool = False) -> None:
        """The executor has finished the command."""
        self._note_collective()
        self.executed += 1
        self._busy_since = None
        if forward:
            self._last_forward = self._clock()

    def busy_seconds(self) -> float:
        """Age of the running command; 0 when idle."""
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    def quiet_seconds(self) -> float:
        """Since the last forward ended; 0 while a command runs."""
        return 0.0 if self._busy_since is not None else self._clock() - self._last_forward

    def since_collective_milliseconds(self) -> int:
        """Age of the last completed collective, or ``NEVER_MILLISECONDS``."""
        if self._busy_since is not None:
            self._note_collective()
        if self._collective is None:
            return NEVER_MILLISECONDS
        return min(NEVER_MILLISECONDS, int(1000 * (self._clock() - self._collective)))

    def stuck(self, seconds: float) -> bool:
        """Whether a command has been running for ``seconds`` without completing a collective."""
        since = self._busy_since
        if since is None:
            return False
        self._note_collective()
        return self._clock() - max(since, self._collective or since) > seconds

    def _note_collective(self) -> None:
        seconds = self._seconds()
        if seconds != self._seen:
            self._seen = seconds
            self._collective = self._clock()
