import asyncio

import pytest

from coordinator.admission import Admission
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
        self.at_ranks = []
        self.batches = []
        self.arrived = asyncio.Event()

    def free(self):
        return self.depth - len(self.at_ranks)

    def running(self):
        return len(self.at_ranks)

    def dispatch(self, batch):
        self.arrived.set()
        self.at_ranks.append(batch)
        self.batches.append([ticket.request.request_id for ticket in batch])

    def finish(self, queue):
        for ticket in self.at_ranks.pop(0):
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
        await scenario(Queue(Admission(64, 0), ranks), ranks)

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
            if ranks.at_ranks:
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
        while ranks.at_ranks:
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
        while ranks.at_ranks:
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


# ---- overload


def busy(queue_size=256, factor=2.5, turn=0.05, usual=0.1):
    """Admission that has seen batches of ``turn`` seconds, and answers after ``usual``."""
    admission = Admission(queue_size, factor)
    admission.took(turn)
    admission.answered(usual, 0.0)
    return admission


def overloaded(scenario, admission):
    async def main():
        ranks = Ranks()
        await scenario(Queue(admission, ranks), ranks)

    asyncio.run(main())


def flood(queue, count, **about):
    """``count`` requests that cannot be joined: those accepted, and the refusals."""
    accepted, refused = [], []
    for number in range(count):
        try:
            accepted.append(ask(queue, str(number), entry=model(), joinable=False, **about))
        except ResourceExhausted as error:
            refused.append(error)
    return accepted, refused


def test_a_burst_waits_and_overload_is_refused_down_to_the_usual_latency():
    async def scenario(queue, ranks):
        burst, refused = flood(queue, 2 + 20)  # at the ranks, and a second of work
        assert not refused
        more, refused = flood(queue, 100)
        assert (more, len(refused)) == ([], 100)
        await asyncio.sleep(0)
        kept = [ticket for ticket in burst if not ticket.future.done()]
        assert kept == burst[: 2 + 3]  # the last of them after 5 turns: 2.5 times the usual latency
        assert queue.depth == 3
        assert all(isinstance(ticket.future.exception(), ResourceExhausted) for ticket in burst[5:])
        assert refused[-1].retry_after_ms == 250
        assert "3 requests wait, for 0.25 s" in refused[-1].message
        ranks.finish(queue)
        again, refused = flood(queue, 2)
        assert (len(again), len(refused)) == (1, 1)

    overloaded(scenario, busy())


def test_the_next_batch_is_never_refused_and_what_joins_it_neither():
    async def scenario(queue, ranks):
        flood(queue, 40)
        while ranks.at_ranks:
            ranks.finish(queue)
        entry = model(rows=8)
        for number in range(2 + 8):
            ask(queue, str(number), entry=entry)
        with pytest.raises(ResourceExhausted):
            ask(queue, "one too many", entry=entry)

    overloaded(scenario, busy(turn=0.2, usual=0.1))


def test_when_the_flood_has_ended_bursts_are_welcome_again():
    admission = busy()
    assert not admission.admits(30, 30, 2, now=10.0)
    assert not admission.admits(10, 10, 2, now=10.5)
    admission.answered(9.0, now=10.6)  # what is answered meanwhile says nothing of ordinary times
    assert not admission.admits(10, 10, 2, now=11.0)
    assert admission.admits(3, 3, 2, now=11.5)
    assert admission.admits(10, 10, 2, now=13.0)


@pytest.mark.parametrize(
    "admission", [Admission(16, 2.5), busy(16, factor=0)], ids=["nothing measured", "switched off"]
)
def test_by_number_alone(admission):
    async def scenario(queue, ranks):
        accepted, refused = flood(queue, 100)
        assert (len(accepted), len(refused)) == (2 + 16, 82)

    overloaded(scenario, admission)


def test_many_slow_requests_are_a_burst_while_they_are_few():
    async def scenario(queue, ranks):
        assert flood(queue, 2 + 16)[1] == []
        assert len(flood(queue, 1)[1]) == 1

    overloaded(scenario, busy(turn=5.0, usual=5.0))


def test_a_request_larger_than_a_batch_is_one():
    async def scenario(queue, ranks):
        entry = model(rows=4)
        for number in range(2 + 3):
            ask(queue, str(number), entry=entry, rows=1000)
        assert queue.depth == queue._batches == 3
        while ranks.at_ranks:
            ranks.finish(queue)
        assert queue.depth == queue._batches == 0

    overloaded(scenario, busy())


def test_requests_without_rows_are_batches_of_their_own():
    async def scenario(queue, ranks):
        for _ in range(3):
            flood(queue, 10, rows=0)
            while ranks.at_ranks:
                ranks.finish(queue)
            assert queue.depth == queue._batches == 0

    overloaded(scenario, busy())


def test_one_slow_batch_is_no_overload():
    admission = busy(turn=0.01, usual=0.02)
    admission.took(30.0)
    assert admission.admits(60, 60, 2, now=1.0)
    for _ in range(20):  # but many are
        admission.took(1.0)
    assert not admission.admits(60, 60, 2, now=2.0)


def test_what_would_be_refused_anyway_is_told_before_it_is_copied():
    async def scenario(queue, ranks):
        queue.check()
        flood(queue, 2 + 16)
        with pytest.raises(ResourceExhausted):
            queue.check()
        ranks.finish(queue)
        queue.check()

    overloaded(scenario, Admission(16, 2.5))
