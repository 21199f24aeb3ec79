"""How a generation ends in order, and who is named when a rank that failed alone leaves its peers in confusion."""

import asyncio

import pytest

from coordinator.commands import Executed, Failed, Probe
from coordinator.errors import ResourceExhausted, Unavailable
from coordinator.generation import Ending
from tests.unit.test_coordinator_generation import FORWARD, OOM, run

UNAVAILABLE = 14
LEAVING = Ending("draining", "rank 1 is draining", 1)


def test_one_that_is_left_finishes_what_it_was_given_and_takes_no_more():
    async def scenario(generation, channels):
        first = generation.dispatch(FORWARD)
        generation.leave(LEAVING)
        assert not generation.alive
        assert not generation.ended.done()
        with pytest.raises(Unavailable, match="rank 1 is draining") as refused:
            await generation.dispatch(FORWARD)
        assert refused.value.retry_after_ms is not None
        assert len(channels[0].sent) == 1
        answers = [Executed([]), Executed([])]
        for rank, answer in enumerate(answers):
            generation.answered(rank, 0, answer)
        assert await first == answers
        assert generation.ended.result() == LEAVING
        assert all(channel.closed for channel in channels)

    run(scenario)


def test_one_that_is_left_idle_ends_at_once():
    async def scenario(generation, channels):
        generation.leave(LEAVING)
        assert generation.ended.result() == LEAVING
        generation.leave(Ending("draining", "again"))
        assert generation.ended.result() == LEAVING

    run(scenario)


def test_one_that_is_left_still_ends_with_a_lost_rank():
    async def scenario(generation, channels):
        first = generation.dispatch(FORWARD)
        generation.leave(LEAVING)
        generation.disconnected(0, "gone")
        with pytest.raises(Unavailable, match="rank 0 was lost: gone"):
            await first

    run(scenario)


@pytest.mark.parametrize("symptom", ["collective", "broken", "disconnected"])
def test_the_request_that_one_rank_failed_alone_has_its_own_error_whatever_its_peers_say(symptom):
    """Rank 1 runs out of memory and goes on to the next command; rank 0 waits for it in the first one's collective."""

    async def scenario(generation, channels):
        bad, other = generation.dispatch(FORWARD), generation.dispatch(Probe())
        generation.answered(1, 0, Failed(OOM, "OutOfMemory", "no memory left", False))
        if symptom == "collective":
            generation.answered(0, 0, Failed(UNAVAILABLE, "CollectiveMismatch@1", "out of step", True))
        elif symptom == "broken":
            generation.broken(0, "out of step")
        else:
            generation.disconnected(0, "reset")
        with pytest.raises(ResourceExhausted, match="rank 1 failed alone: no memory left") as own:
            await asyncio.wait_for(bad, 5)
        assert own.value.retry_after_ms is None
        with pytest.raises(Unavailable) as others:
            await other
        assert others.value.retry_after_ms is not None
        assert generation.ended.result().kind == ("rank_lost" if symptom == "disconnected" else "uneven")

    run(scenario)
