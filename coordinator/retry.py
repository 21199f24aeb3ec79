"""When a failed call may be made again, and after how long.

Forward has no side effects, so a call that failed UNAVAILABLE (a rank was lost, the group is re-forming, the
coordinator restarts) can simply be made again.  RESOURCE_EXHAUSTED is retried only where the server says that waiting
helps: a full queue, not a request too large for the devices.  Everything happens within the caller's deadline.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc


class Failure(Protocol):
    """What a failed call tells: its status code, and the server's hint in seconds (None: there was none)."""

    retry_after: float | None

    def code(self) -> grpc.StatusCode: ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most ``attempts`` calls (None: as many as the deadline allows), paused by exponential backoff.

    The pause before retry n is ``initial * multiplier ** n`` seconds, at most ``maximum``, less up to ``jitter`` of
    itself (so that clients of a cluster that comes back do not all arrive at once), and never less than the server's
    hint.
    """

    attempts: int | None = None
    initial: float = 0.2
    multiplier: float = 2.0
    maximum: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; at least 1 call has to be made")
        if self.initial <= 0 or self.maximum < self.initial or self.multiplier < 1 or not 0 <= self.jitter < 1:
            raise ValueError(f"not a usable policy: {self}")

    @classmethod
    def of(cls, retries: RetryPolicy | int | bool | None) -> RetryPolicy:
        """From a number of retries after the first call; True: until the deadline; None, False or 0: none."""
        if isinstance(retries, RetryPolicy):
            return retries
        if retries is True:
            return cls()
        if not isinstance(retries, (int, type(None))) or (retries or 0) < 0:
            raise ValueError(f"retries is {retries!r}; give a number from 0, True, or a RetryPolicy")
        return cls(attempts=int(retries or 0) + 1)

    def pause(self, retry: int) -> float:
        """Seconds before retry number ``retry`` (from 0), hints aside."""
        # The exponent is bounded: a float overflows past 2**1024, and the cap is reached long before.
        pause = min(self.maximum, self.initial * self.multiplier ** min(retry, 64))
        return pause * (1 - self.jitter * random.random())


@dataclass(slots=True)
class Attempts:
    """One call's attempts against its deadline; does no I/O, so that the blocking and the async client share it."""

    policy: RetryPolicy
    timeout: float | None
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _failed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def remaining(self) -> float | None:
        """Seconds left for the next attempt; None without a deadline."""
        return None if self.timeout is None else max(0.0, self.timeout - (self.clock() - self._started))

    def pause_after(self, failure: Failure) -> float | None:
        """Counts a failed attempt. Returns the seconds to wait before the next one; None: give up."""
        self._failed += 1
        if not retryable(failure) or (self.policy.attempts is not None and self._failed >= self.policy.attempts):
            return None
        pause = max(self.policy.pause(self._failed - 1), failure.retry_after or 0.0)
        remaining = self.remaining()
        return pause if remaining is None or pause < remaining else None


def retryable(failure: Failure) -> bool:
    code = failure.code()
    return code is grpc.StatusCode.UNAVAILABLE or (
        code is grpc.StatusCode.RESOURCE_EXHAUSTED and failure.retry_after is not None
    )
