"""The helper that every multi-process test stands on must itself fail when a rank fails."""

import os
import signal
import time

import pytest
import torch

from tests.multiprocess.ranks import Place, RankFailed, Ranks, on_ranks


def _sum(place: Place) -> float:
    return float(place.group().all_reduce_sum_(torch.tensor([place.rank + 1.0])).item())


def _fail_on_last(place: Place) -> None:
    if place.rank == place.world_size - 1:
        raise ValueError("deliberate")


def _sleep(place: Place, seconds: float) -> None:
    time.sleep(seconds)


def _die(place: Place) -> str:
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_results_come_back_in_rank_order_and_the_pool_is_reused() -> None:
    assert on_ranks(2, _sum) == [3.0, 3.0]
    assert on_ranks(2, _sum) == [3.0, 3.0]


def test_an_exception_on_one_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1.*ValueError: deliberate"):
        on_ranks(2, _fail_on_last)
    assert on_ranks(2, _sum) == [3.0, 3.0]


def test_a_rank_that_does_not_finish_is_an_error() -> None:
    with Ranks(1) as ranks, pytest.raises(RankFailed, match="in time"):
        ranks.run(_sleep, 20, timeout=0.2)


def test_a_dead_rank_is_an_error_unless_expected() -> None:
    with Ranks(2) as ranks:
        assert ranks.run(_die, may_die={1}) == ["alive", None]
    with Ranks(2) as ranks, pytest.raises(RankFailed, match="rank 1: died"):
        ranks.run(_die)
