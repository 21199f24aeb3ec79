"""By when a call has to be over."""

from __future__ import annotations

import math
import time

import grpc

from coordinator.client.transport.failures import CallFailed

_LONGEST = 1e6  # seconds of one wait; the kernel counts them as milliseconds in 32 bits


class Deadline:
    """``timeout`` seconds from now; None or infinite: never."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._ends = None if timeout is None or timeout == math.inf else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds, more than 0; None: without end. Raises CallFailed (DEADLINE_EXCEEDED)."""
        if self._ends is None:
            return None
        left = self._ends - time.monotonic()
        if left <= 0:
            raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, f"Deadline Exceeded: {self._timeout:.3g} s have passed")
        return left

    def milliseconds(self) -> float | None:
        """For ``poll``, which may come back earlier. Raises CallFailed (DEADLINE_EXCEEDED)."""
        left = self.remaining()
        return None if left is None else min(left, _LONGEST) * 1e3

    def part(self, most: float, shares: int) -> Deadline:
        """For one of ``shares`` steps, which gets ``most`` seconds at most. Raises CallFailed (DEADLINE_EXCEEDED)."""
        left = self.remaining()
        if left is None:
            return Deadline(most)
        return self if left <= most and shares == 1 else Deadline(min(most, left / shares))
