"""Several ranks as threads of one process: a backend that exchanges tensors through memory, in lockstep.

For tests of what is computed. How real backends behave (failures, timing, devices) is tested with real processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tensor_parallel import Group
from tensor_parallel.errors import CollectiveAborted

_DEADLINE = 50.0


class _Meeting:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.slots: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=_DEADLINE)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        try:
            self.slots[rank] = value
            self.barrier.wait()
            result = list(self.slots)
            self.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise CollectiveAborted("a peer failed or did not come") from error
        return result


class ThreadBackend:
    """One thread's connection to the others."""

    name = "threads"

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.meeting, self.rank, self.world_size = meeting, rank, meeting.ranks

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        parts = self.meeting.exchange(self.rank, tensor.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return tensor.copy_(total)

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        parts = self.meeting.exchange(self.rank, tensor.clone())
        assert [p.shape[dim] for p in parts] == list(sizes)
        return torch.cat(parts, dim)

    def reduce_scatter_sum(self, tensor: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        total = self.all_reduce_sum_(tensor.clone())
        return total.split(list(sizes), dim)[self.rank].contiguous()

    def broadcast_(self, tensor: Tensor, src: int) -> Tensor:
        return tensor.copy_(self.meeting.exchange(self.rank, tensor.clone())[src])

    def barrier(self) -> None:
        self.meeting.exchange(self.rank, None)

    def abort(self, reason: str) -> None:
        self.meeting.barrier.abort()

    def close(self) -> None:
        pass


def run_ranks(ranks: int, body: Callable[[Group], Any]) -> list[Any]:
    """``body(group)`` on every rank; the results by rank. The first failure ends all and is raised here."""
    meeting = _Meeting(ranks)
    results: list[Any] = [None] * ranks
    failures: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            results[rank] = body(Group(rank, ranks, ThreadBackend(meeting, rank)))
        except BaseException as error:
            if not isinstance(error, CollectiveAborted):
                failures.insert(0, error)
            else:
                failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _DEADLINE)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "a rank did not finish"
    return results
