"""How many requests may wait.

In ordinary use as many as the queue holds: whoever has patience is answered. Under overload that would help nobody, for
the queue stays full and everyone's latency is the queue's length. So once more wait than a burst explains, whoever
could not be answered in a few times the usual latency is refused at once, and may try elsewhere or later; until for a
while nobody had to be. (The idea of CoDel, Nichols and Jacobson 2012: what tells a bad queue from a good one is that it
does not drain; and of adaptive concurrency limits: the latency without a queue is the measure.)
"""

from __future__ import annotations

BURST_SECONDS, BURST_BATCHES = 1.0, 16  # of work that may wait before it counts as overload, whichever is more
CALM_SECONDS, LONGEST_CALM = 1.0, 10.0  # without a refusal, until it is over; or a batch's time, if that is more
_WEIGHT, _OUTLIER = 0.2, 4.0  # of a new measurement in an average, which counts as at most so many times the average


class Admission:
    """``most`` requests wait at most; under overload those with ``factor`` times the usual latency ahead of them (0: as
    many as ever). Times are seconds of the event loop's clock."""

    def __init__(self, most: int, factor: float) -> None:
        self._most = most
        self._factor = factor
        self._turn = 0.0
        self._usual = 0.0
        self._strict_until = 0.0

    def took(self, seconds: float) -> None:
        """A batch kept the ranks busy for so long."""
        self._turn = _average(self._turn, seconds)

    def answered(self, seconds: float, now: float) -> None:
        """A request that found none waiting was answered within ``seconds``."""
        if now >= self._strict_until:
            self._usual = _average(self._usual, seconds)

    def admits(self, requests: int, batches: int, ahead: int, now: float) -> bool:
        """Whether so many requests, which go as so many batches after the ``ahead`` at the ranks, may wait."""
        in_time = self.fits(batches, ahead) if now < self._strict_until else not self.excessive(batches)
        if in_time and requests <= self._most:
            return True
        self._strict_until = now + min(max(CALM_SECONDS, self._turn), LONGEST_CALM)
        return False

    def fits(self, batches: int, ahead: int) -> bool:
        """Whether the last of them is answered in time, as time is counted under overload. The next one always is."""
        return batches <= 1 or not self._measured or self.wait(batches, ahead) <= self._factor * self._usual

    def wait(self, batches: int, ahead: int) -> float:
        """Seconds until the last of them is answered, as things go now."""
        return (batches + ahead) * self._turn

    def excessive(self, batches: int) -> bool:
        """So many are no burst, and would not be answered soon whatever happens now."""
        return self._measured and batches > BURST_BATCHES and batches * self._turn > BURST_SECONDS

    @property
    def _measured(self) -> bool:
        return bool(self._factor and self._turn and self._usual)


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (min(new, _OUTLIER * old) - old) if old else new
