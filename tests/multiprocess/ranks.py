"""Run functions on N real rank processes, with a deadline, and get their results or their tracebacks back.

    from tests.multiprocess.ranks import Place, on_ranks

    def sums_to_three(place: Place) -> float:
        group = place.group("gloo")
        return all_reduce_sum(torch.tensor(place.rank + 1.0), group).item()

    def test_sum() -> None:
        assert on_ranks(2, sums_to_three) == [3.0, 3.0]

``on_ranks`` keeps one pool of processes per world size for the whole test run, so that a case costs milliseconds; a
pool in which anything failed is killed and replaced. Processes fork from a server that has torch loaded. ``Ranks`` is
one pool, for tests that kill its members. Functions must be importable: top-level, or ``functools.partial`` of one.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from tensor_parallel.backends import form_backend, shm
from tensor_parallel.group import Backend, Group

_PATIENCE = timedelta(seconds=20)
_GRACE = 3.0  # seconds the other ranks get to finish once one has failed
_groups: dict[str, Group] = {}  # of a rank process, by backend kind
_clients: dict[int, TCPStore] = {}  # of a rank process, by port


class RankFailed(AssertionError):
    """A rank raised, died, or did not finish in time; the message holds every rank's traceback."""


@dataclass(frozen=True)
class Place:
    """What a rank process knows: its rank, the world size, and where the ranks of this run meet."""

    rank: int
    world_size: int
    store_port: int
    run: str

    def store(self, name: str = "") -> Store:
        """A store that all ranks of this run share, and no other run; ``name`` keeps generations apart."""
        if self.store_port not in _clients:  # making one may cost seconds of name look-up
            _clients[self.store_port] = TCPStore("127.0.0.1", self.store_port, None, False, _PATIENCE)
        return PrefixStore(f"{self.run}/{name}", _clients[self.store_port])

    def form(self, kind: str = "gloo", name: str = "", timeout: timedelta = _PATIENCE) -> Backend:
        """A new backend of :func:`form_backend`'s kinds, or ``"pure"``: shared memory without its compiled part."""
        if kind == "pure":
            with patch.object(shm, "load_library", lambda: None):
                return self.form("shm", f"pure/{name}", timeout)
        return form_backend(
            kind, store=self.store(f"{kind}/{name}"), rank=self.rank, world_size=self.world_size, timeout=timeout
        )

    def group(self, kind: str = "gloo") -> Group:
        """A group kept for the life of this process."""
        if kind not in _groups:
            backend = self.form(kind, "kept") if self.world_size > 1 else None
            _groups[kind] = Group(self.rank, self.world_size, backend)
        return _groups[kind]

    @contextlib.contextmanager
    def launched(self, port: int) -> Any:
        """The environment that ``torchrun`` would give this rank."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        values = (self.rank, self.world_size, self.rank, "127.0.0.1", port)
        os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)


class Ranks:
    """A pool of ``world_size`` processes that run one function at a time, each with its own :class:`Place`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._server = TCPStore("127.0.0.1", 0, None, True, _PATIENCE, False)
        context = _fork_server()
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._runs = 0
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True, name=f"rank{rank}")
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    def set(self, store: str, key: str) -> None:
        """Tell the function that runs something, through ``place.store(store)``."""
        PrefixStore(f"run{self._runs}/{store}", self._server).set(key, "1")

    def wait_for(self, *keys: str) -> None:
        """Until the function that runs has set ``keys`` in ``place.store()``."""
        PrefixStore(f"run{self._runs}/", self._server).wait(list(keys), _PATIENCE)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 30, may_die: Collection[int] = ()
    ) -> list[Any]:
        """``function(place, *args)`` on every rank; results in rank order, None for a rank of ``may_die`` that died."""
        self.start(function, *args, timeout=timeout)
        return self.finish(timeout, may_die)

    def start(self, function: Callable[..., Any], *args: Any, timeout: float = 30) -> None:
        """The first half of :meth:`run`, for tests that do something to the ranks meanwhile."""
        self._runs += 1
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, Place(rank, self.world_size, self._server.port, f"run{self._runs}"), args, timeout))

    def finish(self, timeout: float = 30, may_die: Collection[int] = ()) -> list[Any]:
        """The second half of :meth:`run`: results, or :class:`RankFailed`."""
        deadline = time.monotonic() + timeout
        waiting = dict(zip(self._pipes, range(self.world_size), strict=True))
        results: list[Any] = [None] * self.world_size
        failures: dict[int, str] = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), "did not finish in time"))
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                ok, value = self._receive(pipe, rank)  # type: ignore[arg-type]
                if ok:
                    results[rank] = value
                elif not (value == "died" and rank in may_die):
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if failures:
            self.close()
            raise RankFailed("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return results

    def kill(self, rank: int, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one rank's process."""
        os.kill(self.pids[rank], sig)

    def close(self) -> None:
        """Kill what is left. Idempotent."""
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
        for process in self.processes:
            process.join(10)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        if all(process.is_alive() for process in self.processes):
            self._dismiss()
        self.close()

    def _dismiss(self) -> None:
        """Let the processes end by themselves, so that they can flush what they measure."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)

    def _receive(self, pipe: Connection, rank: int) -> tuple[bool, Any]:
        try:
            return pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(5)
            return False, "died"


_pools: dict[int, Ranks] = {}


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """``function(place, *args)`` on every rank of the pool of that size; results in rank order."""
    if world_size not in _pools:
        _pools[world_size] = Ranks(world_size)
    try:
        return _pools[world_size].run(function, *args, timeout=timeout)
    except RankFailed:
        _pools.pop(world_size).close()
        raise


def free_port() -> int:
    """A port that the kernel says is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.__exit__()
    _pools.clear()


def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tensor_parallel"])
    return context


def _serve(pipe: Connection, rank: int) -> None:
    """The life of a rank process: run what arrives until told to stop or the parent is gone."""
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
        function, place, args, timeout = job
        torch.manual_seed(1234)
        faulthandler.dump_traceback_later(timeout + 1, exit=True)
        try:
            answer = (True, function(place, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)
