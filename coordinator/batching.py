"""The queue: bounded, by priority, and joined into batches.

A request waits only while the ranks have enough to do. When a place in the pipeline is free the most urgent request
leaves, together with whatever queued meanwhile that equals it in all but the batch dimension. So a lone client waits
for nothing, and the batch grows with the load by itself. With one command at the ranks already, the next may wait up to
the model's delay to grow: the ranks are busy anyway.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.admission import Admission
from coordinator.catalog import ModelVersion
from coordinator.errors import DeadlineExceeded, ResourceExhausted, ServiceError
from coordinator.types import InferRequest, InferResult, Timings

DEFAULT_PRIORITY = 100
RETRY_FIRST, RETRY_MOST = 20, 5000  # milliseconds


@dataclass(slots=True, eq=False)
class Ticket:
    """One request. ``key`` is equal for requests that may share a forward, None for one that may not."""

    request: InferRequest
    entry: ModelVersion
    rows: int
    key: Hashable
    future: asyncio.Future[InferResult]
    queued: float
    order: tuple[int, int] = (0, 0)
    left: bool = False
    timings: Timings = field(default_factory=Timings)

    def __lt__(self, other: Ticket) -> bool:
        return self.order < other.order

    @property
    def waiting(self) -> bool:
        return not self.left and not self.future.done()


class Pipeline(Protocol):
    """Where batches go."""

    def free(self) -> int:
        """Commands that may be dispatched now; 0 or less while the pipeline is full, or there is no generation."""

    def running(self) -> int:
        """Commands at the ranks."""

    def dispatch(self, batch: list[Ticket]) -> None:
        """Must not fail: it answers the tickets' futures whatever happens."""


class Queue:
    """Everything that was accepted and not dispatched."""

    def __init__(self, admission: Admission, pipeline: Pipeline) -> None:
        self._admission = admission
        self._pipeline = pipeline
        self._loop = asyncio.get_running_loop()
        self._heap: list[Ticket] = []
        self._lanes: dict[Hashable, list[Ticket]] = {}
        self._rows: dict[Hashable, int] = {}
        self._batches = 0
        self._arrivals = 0
        self._timer: asyncio.TimerHandle | None = None
        self.depth = 0

    def check(self) -> None:
        """Raises ResourceExhausted when one more would be refused whatever it is: before its tensors are copied."""
        batches = max(1, self._batches)
        if not self._admission.admits(self.depth + 1, batches, self._pipeline.running(), self._loop.time()):
            raise self._full()

    def passed(self, ticket: Ticket) -> bool:
        """Whether the ticket went by an idle queue: there was nothing to wait for, nor to be joined with."""
        if self.depth or self._pipeline.running() or self._pipeline.free() <= 0 or self._late(ticket):
            return False
        ticket.left = True
        self._pipeline.dispatch([ticket])
        return True

    def submit(self, ticket: Ticket) -> None:
        """Raises ResourceExhausted when too many wait. The ticket's future is answered sooner or later."""
        batches = self._batches + self._change(ticket, 1)
        if not self._admission.admits(self.depth + 1, batches, self._pipeline.running(), self._loop.time()):
            if self._admission.excessive(batches):
                self._shed()
            raise self._full()
        self._arrivals += 1
        ticket.order = (ticket.request.priority or DEFAULT_PRIORITY, self._arrivals)
        heapq.heappush(self._heap, ticket)
        if ticket.key is not None:
            bisect.insort(self._lanes.setdefault(ticket.key, []), ticket)
        self._count(ticket, 1)
        self.depth += 1
        ticket.future.add_done_callback(lambda _: self._answered(ticket))
        self.pump()

    def pump(self) -> None:
        """Dispatches what can be; called whenever something was queued or came back."""
        while self._heap and self._pipeline.free() > 0:
            head = self._head()
            if head is None or self._may_grow(head):
                return
            self._pipeline.dispatch(self._take(head))

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        """Answers everything that waits with an error."""
        for ticket in [ticket for ticket in self._heap if ticket.waiting]:
            ticket.future.set_exception(error())
            self._remove(ticket)
        self._heap.clear()

    def _shed(self) -> None:
        """Refuses those whose turn would come too late, the last first."""
        for ticket in sorted((ticket for ticket in self._heap if ticket.waiting), reverse=True):
            if self._admission.fits(self._batches, self._pipeline.running()):
                return
            ticket.future.set_exception(self._full())
            self._remove(ticket)

    def _full(self) -> ResourceExhausted:
        seconds = self._admission.wait(self._batches, self._pipeline.running())
        message = f"the queue is full ({self.depth} requests wait, for {seconds:.2g} s of work)"
        return ResourceExhausted(message, retry_after_ms=round(min(max(1e3 * seconds, RETRY_FIRST), RETRY_MOST)))

    def _change(self, ticket: Ticket, sign: int) -> int:
        """How many batches more (``sign`` 1) or less (-1) it takes with the ticket; a large one is one by itself."""
        if ticket.key is None:
            return sign
        rows, most = self._rows.get(ticket.key, 0), _limits(ticket.entry)[0]
        return -(-(rows + sign * min(ticket.rows, most)) // most) - -(-rows // most)

    def _count(self, ticket: Ticket, sign: int) -> None:
        self._batches += self._change(ticket, sign)
        if ticket.key is not None:
            left = self._rows.pop(ticket.key, 0) + sign * min(ticket.rows, _limits(ticket.entry)[0])
            if left:
                self._rows[ticket.key] = left

    def _head(self) -> Ticket | None:
        while self._heap and not self._live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def _live(self, ticket: Ticket) -> bool:
        """Drops a ticket whose deadline has passed."""
        if ticket.waiting and self._late(ticket):
            ticket.future.set_exception(DeadlineExceeded("the deadline passed while the request was queued"))
            self._remove(ticket)
        return ticket.waiting

    def _late(self, ticket: Ticket) -> bool:
        deadline = ticket.request.deadline
        return deadline is not None and self._loop.time() >= deadline

    def _may_grow(self, head: Ticket) -> bool:
        """Whether the batch of ``head`` should wait for more; arms the timer that ends the wait."""
        if head.key is None or not self._pipeline.running():
            return False
        most, delay = _limits(head.entry)
        left = head.queued + delay - self._loop.time()
        if left <= 0 or sum(ticket.rows for ticket in self._lanes[head.key]) >= most:
            return False
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(left, self.pump)
        return True

    def _take(self, head: Ticket) -> list[Ticket]:
        """``head`` and whatever may share its forward, removed from the queue."""
        batch = [head]
        room = _limits(head.entry)[0] - head.rows
        for ticket in [] if head.key is None else self._lanes[head.key]:
            if ticket is head or not ticket.waiting or ticket.rows > room:
                continue
            batch.append(ticket)
            room -= ticket.rows
        now = self._loop.time()
        batch = [ticket for ticket in batch if ticket is head or self._live(ticket)]
        for ticket in batch:
            self._remove(ticket)
            ticket.timings.queue = now - ticket.queued
        return batch

    def _answered(self, ticket: Ticket) -> None:
        if not ticket.left:  # cancelled while it waited
            self._remove(ticket)

    def _remove(self, ticket: Ticket) -> None:
        ticket.left = True
        self.depth -= 1
        self._count(ticket, -1)
        if ticket.key is not None:
            lane = self._lanes[ticket.key]
            del lane[bisect.bisect_left(lane, ticket)]
            if not lane:
                del self._lanes[ticket.key]
        if len(self._heap) > 2 * self.depth + 64:  # mostly tickets that have left: let go of their tensors
            self._heap = [ticket for ticket in self._heap if ticket.waiting]
            heapq.heapify(self._heap)


def _limits(entry: ModelVersion) -> tuple[int, float]:
    """Rows joined at most, and seconds that a request may wait to be joined."""
    assert entry.info is not None
    batching = entry.info.batching
    return max(1, batching.max_joined_rows), batching.max_delay_microseconds / 1e6


def join_key(request: InferRequest, entry: ModelVersion) -> Hashable:
    """Equal for requests that differ in their rows only."""
    inputs = tuple((value.name, value.shape[1:]) for value in request.inputs)
    return (entry.name, entry.version, inputs, tuple(request.outputs))
