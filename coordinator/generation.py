"""One generation as the coordinator sees it: commands out in one order, answers matched, one end for all.

Dispatch is the commit point. It is a plain call that cannot be interrupted, so that no cancellation can leave a command
at some ranks only. Once the generation has ended every command in flight fails UNAVAILABLE, and nothing of it is used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from coordinator.channels import CommandChannel, Dispatch
from coordinator.commands import Answer, Command, Execute, Executed, Failed, describe
from coordinator.errors import ServiceError, Unavailable, from_code
from coordinator.local_channel import LocalMemory
from coordinator.logging import get_logger

Answers = list[Executed | None]
Done = Callable[[Answers | None, ServiceError | None], None]
"""Called once, with the answers by rank or with what went wrong."""

RETRY_MS = 250
# After a symptom (a collective failed, a rank gave up) its cause (a rank is gone) usually shows within milliseconds.
CAUSE_GRACE = 0.05
# Ranks that fail alike do so together; a rank that alone failed leaves the others waiting in a collective.
UNEVEN_GRACE = 1.0


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a generation ended. ``kind`` is a stable word for metrics; ``rank`` the culprit where known.
    ``disconnected``: how that rank's channel was lost, if that was it."""

    kind: str
    reason: str
    rank: int | None = None
    disconnected: str = ""


@dataclass(slots=True)
class _Pending:
    command: Command
    sent: float
    done: Done
    answers: dict[int, Answer] = field(default_factory=dict)
    failed: bool = False


class Generation:
    """``heard(rank)`` is called with every answer: proof of life."""

    def __init__(self, number: int, world_size: int, heard: Callable[[int], None]) -> None:
        self.number = number
        self._heard = heard
        self._world_size = world_size
        self._loop = asyncio.get_running_loop()
        self._channels: list[CommandChannel] = []
        self._memory: LocalMemory | None = None
        self._pending: dict[int, _Pending] = {}
        self._seq = 0
        self._suspicion: asyncio.TimerHandle | None = None
        self._leaving: Ending | None = None
        self.alive = True
        """It has not ended, and takes commands."""
        self.ended: asyncio.Future[Ending] = self._loop.create_future()
        self.last_completed = self._loop.time()

    def attach(self, channels: list[CommandChannel], memory: LocalMemory | None = None) -> None:
        """``memory`` is shared with the ranks of this host, if there are any."""
        self._channels = channels
        self._memory = memory

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def channel_kinds(self) -> list[str]:
        return [channel.kind for channel in self._channels]

    def waiting(self) -> tuple[float, str, list[int]] | None:
        """The oldest unanswered command: seconds since its turn came, what it is, and the ranks that owe an answer."""
        for pending in self._pending.values():
            missing = [rank for rank in range(self._world_size) if rank not in pending.answers]
            since = max(pending.sent, self.last_completed)
            return self._loop.time() - since, describe(pending.command), missing
        return None

    def dispatch(self, command: Command) -> asyncio.Future[Answers]:
        """As ``send``, with a future of the answers."""
        future: asyncio.Future[Answers] = self._loop.create_future()
        self.send(command, partial(_settle, future))
        return future

    def send(self, command: Command, done: Done) -> None:
        """Sends ``command`` to every rank, after all before it. ``done`` gets their answers by rank as soon as the last
        of them is there; or the request's own error where all ranks raised it alike, or UNAVAILABLE when the generation
        has ended.
        """
        if not self.alive:
            ending = self.ended.result() if self.ended.done() else self._leaving
            assert ending is not None
            _tell(done, None, self._unavailable(ending))
            return
        dispatch = Dispatch(self.number, self._seq, command)
        try:
            if self._memory is not None and isinstance(command, Execute):
                dispatch.placed, dispatch.lease = self._memory.place(self.number, self._seq, command)
        except ServiceError as error:
            self._loop.call_soon(_tell, done, None, error)
            return
        self._seq += 1
        self._pending[dispatch.seq] = _Pending(command, self._loop.time(), done)
        for channel in self._channels:
            channel.send(dispatch)

    def leave(self, ending: Ending) -> None:
        """Ends in good order: takes no more commands, and ends once those in flight are answered. Idempotent."""
        if self.alive:
            self.alive = False
            self._leaving = ending
            self._end_if_left()

    def _end_if_left(self) -> None:
        if self._leaving is not None and not self._pending:
            self.end(self._leaving)

    def room(self, size: int) -> memoryview | None:
        """Memory that the ranks of this host read, for ``size`` bytes of an input; None where there is none."""
        return self._memory.room(size) if self._memory is not None else None

    def end(self, ending: Ending, culprit: tuple[int, ServiceError] | None = None) -> None:
        """Fails everything in flight, at once; ``culprit`` is the seq whose own error ended it. Idempotent."""
        if self.ended.done():
            return
        if culprit is None and (found := self._failed_alone()) is not None:
            culprit, cause = found
            # Its peers were left waiting, or went on to another command: what they saw is a symptom.
            ending = cause if ending.kind in ("collective", "broken") else ending
        self.alive = False
        self.ended.set_result(ending)
        if self._suspicion is not None:
            self._suspicion.cancel()
        get_logger().warning("generation_broken", generation=self.number, reason=ending.reason, rank=ending.rank)
        pending, self._pending = self._pending, {}
        for seq, entry in pending.items():
            own = culprit[1] if culprit is not None and culprit[0] == seq else self._unavailable(ending)
            _tell(entry.done, None, own)
        self.close()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels = []
        if self._memory is not None:
            self._memory.arena.close()
            self._memory = None

    # ---- what the channels bring (Listener)

    def answered(self, rank: int, seq: int, answer: Answer) -> None:
        if self.ended.done():
            return
        self._heard(rank)
        pending = self._pending.get(seq)
        if pending is None or rank in pending.answers:
            self.end(Ending("protocol", f"rank {rank} answered command {seq}, which it does not owe", rank))
            return
        pending.answers[rank] = answer
        if isinstance(answer, Failed):
            pending.failed = True
            if answer.collective:
                self.suspect(Ending("collective", f"rank {rank}: {answer.message}", rank))
                return
            if len(pending.answers) < self._world_size:
                patience = max(UNEVEN_GRACE, self._loop.time() - pending.sent)
                self._loop.call_later(patience, self._check_uneven, seq)
        if len(pending.answers) == self._world_size:
            self._finish(seq, pending)

    def broken(self, rank: int, reason: str) -> None:
        self.suspect(Ending("broken", f"rank {rank}: {reason}", rank))

    def disconnected(self, rank: int, reason: str) -> None:
        self.end(Ending("rank_lost", f"rank {rank} was lost: {reason}", rank, disconnected=reason))

    def suspect(self, symptom: Ending) -> None:
        """Ends the generation for ``symptom`` unless a cause ends it first, within CAUSE_GRACE seconds."""
        if self._suspicion is None and not self.ended.done():
            self._suspicion = self._loop.call_later(CAUSE_GRACE, self.end, symptom)

    # ---- matching

    def _finish(self, seq: int, pending: _Pending) -> None:
        failures = _failures(pending) if pending.failed else {}
        if failures and not self._alike(failures):
            self._end_uneven(seq, failures)
            return
        del self._pending[seq]
        self.last_completed = self._loop.time()
        if failures:
            first = failures[min(failures)]
            _tell(pending.done, None, from_code(first.code, first.message))
        else:
            answers: Any = [pending.answers[rank] for rank in range(self._world_size)]  # no Failed among them
            _tell(pending.done, answers, None)
        if self._leaving is not None:
            self._end_if_left()

    def _alike(self, failures: dict[int, Failed]) -> bool:
        return len(failures) == self._world_size and len({(f.code, f.kind) for f in failures.values()}) == 1

    def _check_uneven(self, seq: int) -> None:
        pending = self._pending.get(seq)
        if pending is not None and not self.ended.done():
            self._end_uneven(seq, _failures(pending))

    def _failed_alone(self) -> tuple[tuple[int, ServiceError], Ending] | None:
        """The first command in flight that some rank failed by itself, with its own error, and what to say of it."""
        for seq, pending in self._pending.items():
            for rank, answer in sorted(pending.answers.items()):
                if isinstance(answer, Failed) and not answer.collective:
                    return self._alone(seq, rank, answer)
        return None

    def _alone(self, seq: int, rank: int, failure: Failed) -> tuple[tuple[int, ServiceError], Ending]:
        what = describe(self._pending[seq].command)
        error = from_code(failure.code, f"rank {rank} failed alone: {failure.message}")
        return (seq, error), Ending("uneven", f"rank {rank} failed alone in the {what}: {failure.message}", rank)

    def _end_uneven(self, seq: int, failures: dict[int, Failed]) -> None:
        rank = min(failures)
        culprit, ending = self._alone(seq, rank, failures[rank])
        self.end(ending, culprit)

    def _unavailable(self, ending: Ending) -> Unavailable:
        message = f"generation {self.number} has ended: {ending.reason}"
        return Unavailable(message, retry_after_ms=RETRY_MS)


def _failures(pending: _Pending) -> dict[int, Failed]:
    return {rank: answer for rank, answer in pending.answers.items() if isinstance(answer, Failed)}


def _tell(done: Done, answers: Answers | None, error: ServiceError | None) -> None:
    """A fault of ours in whoever waited is logged, and is no fault of the rank that answered."""
    try:
        done(answers, error)
    except Exception as fault:
        get_logger().error("internal_error", exc_info=fault)


def _settle(future: asyncio.Future[Answers], answers: Answers | None, error: ServiceError | None) -> None:
    if future.done():
        return
    if answers is not None:
        future.set_result(answers)
    else:
        assert error is not None
        future.set_exception(error)
        future.exception()  # whoever waited may have gone; that is no error of ours
