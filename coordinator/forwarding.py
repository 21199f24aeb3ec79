"""One forward from request to result: checked, queued, joined, dispatched, assembled, split."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence

from coordinator.admission import Admission
from coordinator.assemble import assemble, split
from coordinator.batching import Queue, Ticket, join_key
from coordinator.catalog import Catalog, ModelVersion
from coordinator.commands import BatchInput, Execute
from coordinator.config import Config
from coordinator.errors import ServiceError, describe
from coordinator.fleet import DRAINING, Fleet
from coordinator.generation import Answers, Ending
from coordinator.metrics import Metrics
from coordinator.types import Buffer, InferRequest, InferResult, TensorValue
from coordinator.validation import check
from coordinator.wire import flat


class Forwarder:
    def __init__(self, config: Config, catalog: Catalog, fleet: Fleet, metrics: Metrics) -> None:
        self._catalog = catalog
        self._fleet = fleet
        self._metrics = metrics
        self._depth = config.pipeline_depth
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self.commands = 0
        """Batches at the ranks."""
        self.requests = 0
        """Requests accepted and not answered."""
        self._admission = Admission(config.queue_size, config.overload_factor)
        self._last_done = 0.0
        self.queue = Queue(self._admission, self)

    async def run(self, request: InferRequest) -> InferResult:
        """Raises ServiceError. A caller that is cancelled leaves the queue; what was dispatched runs to its end."""
        entry = self._entry(request)
        started = self._loop.time()
        rows = check(request, entry).rows
        ticket = Ticket(request, entry, rows, None, self._loop.create_future(), started)
        calm = not self.queue.depth
        self._enter(entry)
        try:
            if not self.queue.passed(ticket):
                ticket.key = join_key(request, entry) if rows and entry.joinable else None
                self.queue.submit(ticket)
            result = await ticket.future
        except BaseException:
            ticket.future.cancel()
            raise
        finally:
            self._exit(entry)
        now = self._loop.time()
        result.timings.total = now - started
        if calm:
            self._admission.answered(now - started, now)
        return result

    def _entry(self, request: InferRequest) -> ModelVersion:
        generation = self._fleet.generation
        if generation is not None and self._fleet.state != DRAINING:
            return self._catalog.ready(request.model, request.version, generation.number)
        if self._fleet.knows_models:  # an unknown model stays unknown, whatever the group does
            self._catalog.find(request.model, request.version)
        raise self._fleet.unavailable()

    async def finished(self) -> None:
        """Until nothing that was accepted waits for its answer."""
        await self._idle.wait()

    def _enter(self, entry: ModelVersion) -> None:
        entry.users += 1
        self.requests += 1
        self._idle.clear()

    def _exit(self, entry: ModelVersion) -> None:
        entry.users -= 1
        self.requests -= 1
        if not self.requests:
            self._idle.set()
        if not entry.users and entry in self._catalog.retiring:
            self._fleet.changed.ring()

    def generation_ended(self, ending: Ending) -> None:
        """Requests that wait would wait for as long as recovery takes, which nobody knows: their callers decide."""
        self.queue.fail_all(self._fleet.unavailable)

    # ---- the pipeline that the queue feeds

    def free(self) -> int:
        return self._depth - self.commands if self._fleet.generation is not None else 0

    def running(self) -> int:
        return self.commands

    def dispatch(self, batch: list[Ticket]) -> None:
        generation = self._fleet.generation
        if generation is None:
            _answer_all(batch, self._fleet.unavailable())
            return
        self.commands += 1
        generation.send(_command(batch), functools.partial(self._done, batch, self._loop.time()))

    def _done(self, batch: list[Ticket], sent: float, answers: Answers | None, error: ServiceError | None) -> None:
        self.commands -= 1
        now = self._loop.time()
        seconds = now - sent
        turn, self._last_done = now - max(sent, self._last_done), now
        if answers is not None:
            self._admission.took(turn)
            self._deliver(batch, answers, seconds)
        elif len(batch) > 1 and self._fleet.generation is not None:
            # All ranks raised it alike. One request may be at fault, or their sum: each runs again by itself, so that
            # it costs the others nothing.
            for ticket in batch:
                if not ticket.future.done():
                    self.dispatch([ticket])
        else:
            assert error is not None
            _answer_all(batch, error)
            _count_failed(batch)
        self.queue.pump()
        self._loop.call_soon(self._measured, batch, seconds)  # behind the answers

    def _measured(self, batch: list[Ticket], seconds: float) -> None:
        name = batch[0].entry.name
        self._metrics.dispatched(name, sum(t.rows for t in batch), [t.timings.queue for t in batch])
        self._metrics.answered(name, seconds)

    def _deliver(self, batch: list[Ticket], answers: Answers, seconds: float) -> None:
        entry = batch[0].entry
        try:
            whole = assemble(answers, entry.placements)
            outputs = [whole] if len(batch) == 1 else split(whole, [ticket.rows for ticket in batch])
        except Exception as error:
            _answer_all(batch, describe(error, batch[0].request.request_id))
            _count_failed(batch)
            return
        ranks = [(answer.forward, answer.collective, answer.copy) for answer in answers if answer is not None]
        forward, collective, copy = map(max, zip(*ranks, strict=True))
        rows = sum([ticket.rows for ticket in batch])
        for ticket, values in zip(batch, outputs, strict=True):
            if ticket.future.done():
                continue
            timings = ticket.timings
            timings.dispatch, timings.rows, timings.ranks = seconds, rows, ranks
            timings.forward, timings.collective, timings.copy = forward, collective, copy
            ticket.future.set_result(InferResult(entry.name, entry.version, values, timings, ticket.request.request_id))
        self._loop.call_soon(_count, entry, batch, seconds, forward, copy)  # behind the answers


def _command(batch: Sequence[Ticket]) -> Execute:
    first = batch[0].request
    entry = batch[0].entry
    if len(batch) == 1:
        ids = [first.request_id]
        inputs = [
            BatchInput(TensorValue(value.name, value.dtype, value.shape, None), [flat(value.data or b"")])
            for value in first.inputs
        ]
    else:
        ids = [ticket.request.request_id for ticket in batch]
        inputs = [_joined(batch, index) for index in range(len(first.inputs))]
    return Execute(entry.name, entry.version, inputs, first.outputs, ids, first.trace_context)


def _joined(batch: Sequence[Ticket], index: int) -> BatchInput:
    value = batch[0].request.inputs[index]
    shape = (sum([ticket.rows for ticket in batch]), *value.shape[1:])
    segments: list[Buffer] = [flat(ticket.request.inputs[index].data or b"") for ticket in batch]
    return BatchInput(TensorValue(value.name, value.dtype, shape, None), segments)


def _answer_all(batch: Sequence[Ticket], error: BaseException) -> None:
    for ticket in batch:
        if not ticket.future.done():
            ticket.future.set_exception(error)


def _count(entry: ModelVersion, batch: Sequence[Ticket], seconds: float, forward: float, copy: float) -> None:
    totals = entry.statistics
    rows = sum(ticket.rows for ticket in batch)
    totals.executions += 1
    totals.rows += rows
    totals.batches[rows] = totals.batches.get(rows, 0) + 1
    totals.last_request_unix_ms = round(time.time() * 1e3)
    for ticket in batch:
        totals.requests_ok += 1
        totals.queue_ns += round(ticket.timings.queue * 1e9)
        totals.compute_ns += round(seconds * 1e9)
        totals.forward_ns += round(forward * 1e9)
        totals.copy_ns += round(copy * 1e9)
        totals.success_ns += round((ticket.timings.queue + seconds) * 1e9)


def _count_failed(batch: Sequence[Ticket]) -> None:
    for ticket in batch:
        ticket.entry.statistics.requests_failed += 1
