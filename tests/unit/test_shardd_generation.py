"""The generation state machine: fences, leases, owners; with a clock of the test's own."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from shardd.errors import InvalidRequest, Superseded, WrongState
from shardd.generation import Generations, State
from shardd.session import Session


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Backend:
    name = "fake"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def abort(self, reason: str) -> None:
        self.calls.append(f"abort {reason}")

    def close(self) -> None:
        self.calls.append("close")


class Channel:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def close(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def generations(clock: Clock) -> Generations:
    return Generations(clock)


def session(generation: int, owner: str = "a") -> Session:
    return Session(generation, owner, Backend(), lambda: None)


def make_ready(generations: Generations, generation: int, owner: str = "a", lease: float = 3.0) -> Session:
    assert generations.fence(generation, owner, lease)[1]
    made = session(generation, owner)
    generations.ready(made, owner, lambda: None)
    return made


def test_the_way_through_the_states(generations: Generations) -> None:
    assert generations.standing().state is State.NOPG
    standing, accepted = generations.fence(1, "a", 3.0)
    assert accepted
    assert (standing.state, standing.generation, standing.owner) == (State.FENCED, 1, "a")
    entered = []
    made = session(1)
    generations.ready(made, "a", lambda: entered.append(1))
    assert entered
    assert generations.standing().state is State.READY
    assert generations.running(1, "a") is made
    generations.broken(made, "a peer died")
    now = generations.standing()
    assert now.state is State.BROKEN
    when, error = now.last_error.split(" ", 1)
    assert error == "a peer died"
    assert abs(datetime.fromisoformat(when) - datetime.now(UTC)) < timedelta(minutes=1)
    assert generations.fence(2, "a", 3.0)[1]


@pytest.mark.parametrize("generation", [0, 4, 5])
def test_only_a_larger_generation_fences(generations: Generations, generation: int) -> None:
    make_ready(generations, 5)
    standing, accepted = generations.fence(generation, "a", 3.0)
    assert not accepted
    assert (standing.state, standing.highest) == (State.READY, 5)


def test_another_owner_waits_for_the_lease(generations: Generations, clock: Clock) -> None:
    make_ready(generations, 1, "a", lease=3.0)
    clock.now += 2.9
    standing, accepted = generations.fence(2, "b", 3.0)
    assert not accepted
    assert standing.owner == "a"
    assert standing.lease_seconds == pytest.approx(0.1)
    generations.renew("a", 3.0)
    clock.now += 2.9
    assert not generations.fence(2, "b", 3.0)[1]
    clock.now += 0.2
    assert generations.standing().owner == ""
    assert generations.fence(2, "b", 3.0)[1]
    with pytest.raises(Superseded, match="owned by b at generation 2"):
        generations.check_owner("a")


def test_the_owner_itself_may_always_fence(generations: Generations) -> None:
    make_ready(generations, 1, "a", lease=60.0)
    assert generations.fence(2, "a", 3.0)[1]


def test_nobody_but_the_owner_renews(generations: Generations, clock: Clock) -> None:
    make_ready(generations, 1, "a", lease=3.0)
    generations.renew("b", 60.0)
    generations.renew("", 60.0)
    assert generations.standing().lease_seconds == pytest.approx(3.0)
    clock.now += 4
    generations.renew("a", 3.0)  # lapsed, but nobody has taken over
    assert generations.standing().owner == "a"


def test_an_owner_whose_channel_broke_must_show_up_soon(generations: Generations, clock: Clock) -> None:
    made = make_ready(generations, 1, "a", lease=4.0)
    generations.orphaned(made)
    clock.now += 0.9
    assert not generations.fence(2, "b", 3.0)[1]
    clock.now += 0.2
    assert generations.fence(2, "b", 3.0)[1]
    generations.orphaned(made)  # too late to touch the new owner's lease
    assert generations.standing().lease_seconds == pytest.approx(3.0)


def test_a_fence_without_an_owner_is_refused(generations: Generations) -> None:
    with pytest.raises(InvalidRequest):
        generations.fence(1, "", 3.0)


def test_leases_are_bounded(generations: Generations) -> None:
    generations.fence(1, "a", 1e9)
    assert generations.standing().lease_seconds <= 60.0


def test_joining_needs_the_fence_of_the_same_owner(generations: Generations) -> None:
    with pytest.raises(WrongState):
        generations.check_fenced(1, "a")
    generations.fence(3, "a", 3.0)
    generations.check_fenced(3, "a")
    for generation, owner, error in ((2, "a", WrongState), (4, "a", WrongState), (3, "b", Superseded)):
        with pytest.raises(error):
            generations.check_fenced(generation, owner)


def test_a_join_overtaken_by_a_fence_enters_nothing(generations: Generations) -> None:
    generations.fence(1, "a", 3.0)
    generations.fence(2, "a", 3.0)
    with pytest.raises(WrongState):
        generations.ready(session(1), "a", lambda: pytest.fail("entered"))
    generations.join_failed(1, "old news")
    assert generations.standing().state is State.FENCED
    generations.join_failed(2, "a peer did not come")
    assert generations.standing().state is State.BROKEN


def test_channels_open_only_on_the_ready_generation(generations: Generations) -> None:
    made = make_ready(generations, 2)
    with pytest.raises(WrongState):
        generations.running(1, "a")
    with pytest.raises(Superseded):
        generations.running(2, "b")
    generations.broken(made, "x")
    with pytest.raises(WrongState, match=r"BROKEN\(2\)"):
        generations.running(2, "a")


def test_an_old_session_breaks_nothing_new(generations: Generations) -> None:
    old = make_ready(generations, 1)
    new = make_ready(generations, 2)
    generations.broken(old, "late")
    assert generations.standing().state is State.READY
    assert generations.session() is new


def test_every_change_is_told() -> None:
    changes: list[int] = []
    generations = Generations(changed=lambda: changes.append(1))
    made = make_ready(generations, 1)
    generations.broken(made, "x")
    assert len(changes) == 3


def test_racing_fences_leave_one_winner_per_generation() -> None:
    generations = Generations()
    accepted: list[int] = []

    def fence(offset: int) -> None:
        for generation in range(1 + offset, 400, 4):
            if generations.fence(generation, "a", 3.0)[1]:
                accepted.append(generation)

    threads = [threading.Thread(target=fence, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) == len(set(accepted))
    assert generations.standing().highest == max(accepted)


def test_a_session_without_a_channel_is_released_by_whoever_ends_it() -> None:
    made = session(1)
    made.end("first")
    made.end("second")
    assert made.reason == "first"
    assert made.released.is_set()
    assert made._backend.calls == ["abort first", "close"]
    with pytest.raises(WrongState, match="has ended: first"):
        made.attach(Channel())


def test_a_session_with_a_channel_is_released_by_the_executor() -> None:
    unbound: list[int] = []
    made = Session(1, "a", Backend(), lambda: unbound.append(1))
    channel = Channel()
    made.attach(channel)
    with pytest.raises(WrongState, match="already has"):
        made.attach(Channel())
    made.end("fenced")
    assert channel.reasons == ["fenced"]
    assert not made.released.is_set()
    made.release()
    assert made.released.is_set()
    assert unbound == [1]


def test_a_single_rank_has_no_backend() -> None:
    made = Session(1, "a", None, lambda: None)
    assert made.backend_name == "local"
    made.end("over")
    assert made.released.is_set()
