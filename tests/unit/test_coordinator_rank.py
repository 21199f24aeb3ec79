"""When a rank is asked for its status: an interval after its last sign of life, and in time for its lease."""

import asyncio

import pytest

from coordinator.config import Config
from coordinator.rank import LEASE_SHARE, LOST_INTERVAL, Rank


@pytest.fixture
def rank():
    async def made():
        return Rank(0, "unix:/nowhere", Config(shards=("unix:/nowhere",)), lambda rank: None)

    loop = asyncio.new_event_loop()
    rank = loop.run_until_complete(made())
    yield rank
    loop.run_until_complete(rank.close())
    loop.close()


def test_a_rank_that_answers_commands_is_asked_less_but_within_its_lease(rank):
    config = Config(shards=("unix:/nowhere",))
    assert rank._next_beat(10.0) == 10.0 + LOST_INTERVAL
    rank.alive = True
    assert rank._next_beat(10.0) == 10.0 + config.heartbeat
    rank.heard(10.1)
    assert rank._next_beat(10.0) == pytest.approx(10.1 + config.heartbeat)  # as soon as if it had been asked then
    for moment in (10.2, 10.5, 11.9):
        rank.heard(moment)
    assert rank._next_beat(10.0) == 10.0 + LEASE_SHARE * config.lease
    assert LEASE_SHARE * config.lease < config.lease / 2
    assert rank._next_beat(13.0) == 13.0 + config.heartbeat  # what was heard before counts no more
