"""Where the coordinator tells what happens: ``metrics.py`` implements it, and everything else calls only this."""

from __future__ import annotations


class Observer:
    """Does nothing by itself. Seconds and bytes; ``code`` is a gRPC status name such as ``OK``."""

    def request_finished(self, model: str, code: str, seconds: float) -> None: ...

    def dequeued(self, model: str, seconds: float) -> None:
        """A request left the queue after waiting ``seconds``."""

    def executed(self, model: str, rows: int, forward: float, collective: float, copy: float) -> None:
        """One command was answered by every rank; ``rows`` in it."""

    def load(self, queue_depth: int, in_flight: int) -> None:
        """The queue and the dispatched commands, whenever either changes."""

    def received(self, size: int) -> None: ...

    def sent(self, size: int) -> None: ...

    def generation_started(self, generation: int, recovery_seconds: float) -> None: ...

    def generation_ended(self, generation: int, reason: str) -> None:
        """``reason`` is a short stable word (rank_lost, hung, uneven, collective, superseded, stopped)."""

    def health_changed(self, serving: bool, models: dict[str, bool], ranks_up: dict[int, bool]) -> None: ...

    def load_finished(self, model: str, code: str, seconds: float) -> None:
        """A Load ended, well or not, ``seconds`` after it was asked for."""
