"""Ranks that fork from a process which has prepared what they all need: a plan costs seconds, and is the same on each.

def prepare_and_train(place: Place) -> None:     # in a process of its own, single-threaded: ``Ranks(1).run(...)``
    plans = ...
    run_forked(place, 4, lambda place: train(place, plans), timeout=60)
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.multiprocess import ranks
from tests.multiprocess.ranks import Place, RankFailed


def run_forked(place: Place, world_size: int, function: Callable[[Place], Any], timeout: float) -> list[Any]:
    """``function(place)`` on ``world_size`` ranks forked from this process; results in rank order.

    Raises :class:`RankFailed` with the tracebacks of those that failed, died, or did not end in time.
    """
    children: dict[Connection, tuple[int, int]] = {}
    for rank in range(world_size):
        ours, theirs = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            ours.close()
            _be_rank(theirs, Place(rank, world_size, place.store_port, f"{place.run}-{place.rank}"), function, timeout)
        theirs.close()
        children[ours] = (rank, pid)
    return _collect(children, time.monotonic() + timeout)


def _be_rank(pipe: Connection, place: Place, function: Callable[[Place], Any], timeout: float) -> None:
    code = 1
    try:
        signal.alarm(int(timeout) + 5)  # should the parent be gone
        ranks._clients.clear()
        ranks._groups.clear()
        try:
            answer = (True, function(place))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        code = 0
    finally:
        os._exit(code)


def _collect(children: dict[Connection, tuple[int, int]], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(children)
    failures: dict[int, str] = {}
    waiting = dict(children)
    try:
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.update({rank: "did not end in time" for rank, _ in waiting.values()})
                break
            for pipe in ready:
                rank, _ = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "died"
                if good:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + 3)
    finally:
        for pipe, (_, pid) in children.items():
            pipe.close()
            if pipe in waiting:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if failures:
        raise RankFailed("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return results
