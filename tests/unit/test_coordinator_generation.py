import asyncio

import grpc
import pytest

from coordinator.commands import Execute, Executed, Failed, Probe
from coordinator.errors import FailedPrecondition, ResourceExhausted, Unavailable
from coordinator.generation import Generation

FORWARD = Execute("m", "1", [], [], ["r"])
OOM = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
REFUSED = grpc.StatusCode.FAILED_PRECONDITION.value[0]


class Channel:
    kind = "test"

    def __init__(self):
        self.sent = []
        self.closed = False

    def send(self, dispatch):
        self.sent.append((dispatch.generation, dispatch.seq, dispatch.command))

    def close(self):
        self.closed = True


def run(scenario, ranks=2):
    async def main():
        heard = []
        generation = Generation(7, ranks, heard.append)
        channels = [Channel() for _ in range(ranks)]
        generation.attach(channels)
        await scenario(generation, channels)

    asyncio.run(main())


def test_every_rank_gets_every_command_in_one_order():
    async def scenario(generation, channels):
        for command in (FORWARD, Probe(), FORWARD):
            generation.dispatch(command).cancel()
        assert channels[0].sent == channels[1].sent == [(7, 0, FORWARD), (7, 1, Probe()), (7, 2, FORWARD)]

    run(scenario)


def test_answers_are_matched_by_rank_in_whatever_order_they_come():
    async def scenario(generation, channels):
        first, second = generation.dispatch(FORWARD), generation.dispatch(FORWARD)
        a, b, c = Executed([]), Executed([]), Executed([])
        generation.answered(1, 0, b)
        generation.answered(1, 1, c)
        assert not first.done()
        generation.answered(0, 0, a)
        assert await first == [a, b]
        assert not second.done()
        assert generation.in_flight == 1

    run(scenario)


def test_a_fault_of_who_waited_is_not_the_ranks():
    async def scenario(generation, channels):
        def fail(answers, error):
            raise ValueError("a bug")

        generation.send(FORWARD, fail)
        good = generation.dispatch(FORWARD)
        for seq in (0, 1):
            for rank in (0, 1):
                generation.answered(rank, seq, None)
        assert await good == [None, None]
        assert generation.alive

    run(scenario)


def test_an_error_alike_on_all_ranks_is_the_requests_own():
    async def scenario(generation, channels):
        bad, good = generation.dispatch(FORWARD), generation.dispatch(FORWARD)
        for rank in (0, 1):
            generation.answered(rank, 0, Failed(REFUSED, "WrongState", f"said by {rank}", False))
        with pytest.raises(FailedPrecondition, match="said by 0"):
            await bad
        for rank in (0, 1):
            generation.answered(rank, 1, None)
        assert await good == [None, None]
        assert generation.alive

    run(scenario)


def test_an_uneven_error_ends_the_generation_and_only_its_request_has_it():
    async def scenario(generation, channels):
        bad, other = generation.dispatch(FORWARD), generation.dispatch(FORWARD)
        generation.answered(1, 0, Failed(OOM, "OutOfMemory", "no memory left", False))
        generation.answered(0, 0, Executed([]))
        with pytest.raises(ResourceExhausted, match="rank 1 failed alone: no memory left") as own:
            await bad
        assert own.value.retry_after_ms is None
        with pytest.raises(Unavailable, match="rank 1 failed alone") as others:
            await other
        assert others.value.retry_after_ms is not None
        assert all(channel.closed for channel in channels)
        assert generation.ended.result().kind == "uneven"

    run(scenario)


def test_a_rank_that_failed_while_another_hangs_is_uneven_after_a_moment(monkeypatch):
    monkeypatch.setattr("coordinator.generation.UNEVEN_GRACE", 0.01)

    async def scenario(generation, channels):
        bad = generation.dispatch(FORWARD)
        generation.answered(0, 0, Failed(OOM, "OutOfMemory", "no memory left", False))
        with pytest.raises(ResourceExhausted, match="rank 0 failed alone"):
            await asyncio.wait_for(bad, 5)

    run(scenario)


def test_a_lost_rank_fails_everything_at_once_naming_it():
    async def scenario(generation, channels):
        waiting = [generation.dispatch(FORWARD) for _ in range(3)]
        generation.disconnected(1, "Socket closed")
        assert all(future.done() for future in waiting)
        with pytest.raises(Unavailable, match="generation 7 has ended: rank 1 was lost: Socket closed"):
            await waiting[2]
        after = generation.dispatch(FORWARD)
        assert isinstance(after.exception(), Unavailable)
        assert generation.ended.result().rank == 1

    run(scenario)


def test_the_cause_is_named_not_the_symptom_that_came_first():
    async def scenario(generation, channels):
        waiting = generation.dispatch(FORWARD)
        generation.answered(0, 0, Failed(14, "PeerLost", "a collective failed", True))
        assert not waiting.done()
        generation.broken(0, "a collective failed")
        generation.disconnected(1, "Socket closed")
        with pytest.raises(Unavailable, match="rank 1 was lost"):
            await waiting

    run(scenario)


def test_a_symptom_without_a_cause_ends_it_too():
    async def scenario(generation, channels):
        waiting = generation.dispatch(FORWARD)
        generation.broken(0, "the rank gave up")
        with pytest.raises(Unavailable, match="rank 0: the rank gave up"):
            await asyncio.wait_for(waiting, 5)

    run(scenario)


@pytest.mark.parametrize("answers", [[(0, 5)], [(0, 0), (0, 0)]])
def test_an_answer_that_nobody_owes_ends_it(answers):
    async def scenario(generation, channels):
        generation.dispatch(FORWARD).add_done_callback(lambda future: future.exception())
        for rank, seq in answers:
            generation.answered(rank, seq, None)
        assert generation.ended.result().kind == "protocol"

    run(scenario)


def test_what_is_waited_for_names_the_ranks_that_owe_an_answer():
    async def scenario(generation, channels):
        assert generation.waiting() is None
        generation.dispatch(FORWARD).add_done_callback(lambda future: future.exception())
        generation.answered(1, 0, None)
        age, what, missing = generation.waiting()
        assert age >= 0
        assert (what, missing) == ("forward of m@1", [0, 2])

    run(scenario, ranks=3)
