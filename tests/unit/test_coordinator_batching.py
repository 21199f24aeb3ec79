import asyncio

import pytest

from coordinator.batching import Queue, Ticket, join_key
from coordinator.catalog import ModelVersion
from coordinator.dtypes import DataType
from coordinator.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from coordinator.types import InferRequest, TensorValue
from protos.tensor_parallel.v1 import coordinator_pb2 as pb


def model(rows=8, delay_us=0, name="m"):
    entry = ModelVersion(name, "1", "p", pb.LoadOptions())
    entry.info = pb.ModelInfo(batching=pb.BatchingOptions(max_joined_rows=rows, max_delay_microseconds=delay_us))
    return entry


class Ranks:
    """A pipeline of ``depth`` that finishes a batch when told to."""

    def __init__(self, depth=2):
        self.depth = depth
        self.running = []
        self.batches = []
        self.arrived = asyncio.Event()

    def free(self):
        return self.depth - len(self.running)

    def idle(self):
        return not self.running

    def dispatch(self, batch):
        self.arrived.set()
        self.running.append(batch)
        self.batches.append([ticket.request.request_id for ticket in batch])

    def finish(self, queue):
        for ticket in self.running.pop(0):
            if not ticket.future.done():
                ticket.future.set_result(ticket.request.request_id)
        queue.pump()


def ask(queue, id, *, entry, rows=1, width=4, joinable=True, priority=0, deadline=None):
    value = TensorValue("x", DataType.FLOAT32, (rows, width), b"")
    request = InferRequest("m", [value], request_id=id, priority=priority, deadline=deadline)
    loop = asyncio.get_running_loop()
    key = join_key(request, entry) if joinable else None
    ticket = Ticket(request, entry, rows, key, loop.create_future(), loop.time())
    queue.submit(ticket)
    return ticket


def run(scenario):
    async def main():
        ranks = Ranks()
        await scenario(Queue(64, ranks), ranks)

    asyncio.run(main())


def test_a_lone_request_waits_for_nothing_whatever_the_delay():
    async def scenario(queue, ranks):
        ask(queue, "a", entry=model(delay_us=10_000_000))
        assert ranks.batches == [["a"]]

    run(scenario)


def test_what_queued_meanwhile_is_joined_up_to_the_rows():
    async def scenario(queue, ranks):
        entry = model(rows=4)
        for id in "abcdefgh":
            ask(queue, id, entry=entry)
        assert ranks.batches == [["a"], ["b"]]
        ranks.finish(queue)
        ranks.finish(queue)
        assert ranks.batches[2:] == [["c", "d", "e", "f"], ["g", "h"]]
        assert queue.depth == 0

    run(scenario)


def test_only_requests_equal_in_all_but_their_rows_are_joined():
    async def scenario(queue, ranks):
        entry, other = model(rows=100), model(rows=100, name="n")
        for id in "ab":
            ask(queue, id, entry=entry)
        ask(queue, "c", entry=entry, rows=3)
        ask(queue, "wide", entry=entry, width=8)
        ask(queue, "other", entry=other)
        ask(queue, "single", entry=entry, joinable=False)
        ask(queue, "d", entry=entry, rows=2)
        for _ in range(6):
            if ranks.running:
                ranks.finish(queue)
        assert ranks.batches == [["a"], ["b"], ["c", "d"], ["wide"], ["other"], ["single"]]

    run(scenario)


def test_a_request_larger_than_the_limit_is_served_alone():
    async def scenario(queue, ranks):
        entry = model(rows=4)
        for id in "ab":
            ask(queue, id, entry=entry)
        ask(queue, "large", entry=entry, rows=9)
        ask(queue, "c", entry=entry)
        ranks.finish(queue)
        ranks.finish(queue)
        assert ranks.batches[2:] == [["large"], ["c"]]

    run(scenario)


def test_the_second_command_waits_for_company_until_the_delay_or_a_full_batch():
    async def scenario(queue, ranks):
        entry = model(rows=3, delay_us=5_000_000)
        for id in "abc":
            ask(queue, id, entry=entry)
        assert ranks.batches == [["a"]]
        ask(queue, "d", entry=entry)
        assert ranks.batches == [["a"], ["b", "c", "d"]]
        entry = model(rows=3, delay_us=2_000)
        ranks.finish(queue)
        late = ask(queue, "e", entry=entry)
        assert len(ranks.batches) == 2
        ranks.arrived.clear()
        await asyncio.wait_for(ranks.arrived.wait(), 10)
        assert late.left
        assert ranks.batches[2] == ["e"]

    run(scenario)


def test_the_delay_ends_when_the_ranks_run_dry():
    async def scenario(queue, ranks):
        entry = model(rows=100, delay_us=60_000_000)
        for id in "ab":
            ask(queue, id, entry=entry)
        ranks.finish(queue)
        assert ranks.batches == [["a"], ["b"]]

    run(scenario)


def test_urgent_requests_go_first_and_equals_in_order():
    async def scenario(queue, ranks):
        entry = model(rows=1)
        for id, priority in [("a", 0), ("b", 0), ("c", 0), ("d", 7), ("e", 2), ("f", 200), ("g", 2)]:
            ask(queue, id, entry=entry, priority=priority)
        while ranks.running:
            ranks.finish(queue)
        assert [batch[0] for batch in ranks.batches] == ["a", "b", "e", "g", "d", "c", "f"]

    run(scenario)


def test_the_queue_is_bounded_and_says_when_to_come_back():
    async def scenario(queue, ranks):
        entry = model(rows=1)
        for n in range(66):
            ask(queue, str(n), entry=entry)
        with pytest.raises(ResourceExhausted, match="64 requests wait") as refused:
            ask(queue, "more", entry=entry)
        assert refused.value.retry_after_ms is not None
        assert queue.depth == 64

    run(scenario)


def test_cancelled_and_late_requests_are_dropped_before_dispatch():
    async def scenario(queue, ranks):
        entry = model(rows=8)
        for id in "ab":
            ask(queue, id, entry=entry)
        gone = ask(queue, "gone", entry=entry)
        late = ask(queue, "late", entry=entry, deadline=asyncio.get_running_loop().time() - 1)
        last = ask(queue, "last", entry=entry)
        gone.future.cancel()
        await asyncio.sleep(0)
        assert queue.depth == 2
        while ranks.running:
            ranks.finish(queue)
        assert ranks.batches == [["a"], ["b"], ["last"]]
        assert isinstance(late.future.exception(), DeadlineExceeded)
        assert last.future.done()
        assert queue.depth == 0

    run(scenario)


def test_requests_that_come_and_go_leave_no_tensors_behind():
    async def scenario(queue, ranks):
        entry = model()
        for id in "ab":
            ask(queue, id, entry=entry)
        for n in range(2000):
            ask(queue, str(n), entry=entry, width=n).future.cancel()
            await asyncio.sleep(0)
        assert queue.depth == 0
        assert len(queue._heap) <= 65
        assert not queue._lanes

    run(scenario)


def test_everything_waiting_fails_at_once():
    async def scenario(queue, ranks):
        tickets = [ask(queue, str(n), entry=model()) for n in range(6)]
        queue.fail_all(lambda: Unavailable("the group is gone"))
        assert [ticket.future.done() for ticket in tickets] == [False] * 2 + [True] * 4
        assert isinstance(tickets[5].future.exception(), Unavailable)
        assert queue.depth == 0
        for ticket in tickets[2:]:
            ticket.future.exception()

    run(scenario)
