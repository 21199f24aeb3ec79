"""Large messages are put together while they arrive and sent in pieces, and nobody else waits or pays for that."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from coordinator.http2.call import Call, Requests, Serving
from coordinator.http2.messages import IDENTITY, Messages, prefix
from tests.unit.test_http2 import Running, running
from tests.unit.test_http2_hostile import CALL, Raw

__all__ = ["running"]  # the fixture

DEADLINE = 20.0  # seconds
LENDS = tuple((name, "/large/lends" if name == ":path" else value) for name, value in CALL)


@pytest.mark.parametrize("most", [1 << 16, 1 << 19, 1 << 22])
def test_large_messages_however_they_are_cut(most: int) -> None:
    """Those that are put together while they arrive, among others; some pieces are empty."""
    dice = random.Random(most)
    sent = [dice.randbytes(size) for size in (3, (256 << 10) - 1, 256 << 10, 0, 1 << 20, 700_001, 5)]
    body = b"".join(prefix(len(one)) + one for one in sent)
    cuts = sorted(dice.choices(range(len(body)), k=2 * len(body) // most)) * 2
    edges = [0, *sorted(cuts), len(body)]
    chunks = iter([body[start:stop] for start, stop in pairwise(edges)])

    async def chunk() -> bytes | None:
        return next(chunks, None)

    async def read() -> list[bytes]:
        return [bytes(one) async for one in Messages(chunk, IDENTITY, 1 << 20)]

    assert asyncio.run(read()) == sent


def test_reads_that_are_cancelled_within_a_message_lose_nothing_of_it() -> None:
    sent = [b"small" * 9, random.Random(5).randbytes(1 << 20), b"", b"last"]
    body = b"".join(prefix(len(one)) + one for one in sent)

    async def read() -> tuple[list[bytes], int]:
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        requests = Requests(Messages(chunks.get, IDENTITY, 1 << 20), bytes)
        found: list[bytes] = []
        cancelled = 0
        edges = [*range(0, 60, 3), *range(60, len(body), 50_000), len(body)]
        for start, stop in pairwise(edges):
            chunks.put_nowait(body[start:stop])
            while not chunks.empty():
                reading = asyncio.ensure_future(anext(requests))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                if not reading.done():
                    cancelled += reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                else:
                    found.append(reading.result())
        chunks.put_nowait(None)
        return found + [one async for one in requests], cancelled

    found, cancelled = asyncio.run(read())
    assert found == sent
    assert cancelled > 20


def test_clients_that_do_not_read_are_lent_no_more_than_some_answers(running: Running) -> None:
    """An answer in pieces lies in memory that the ranks need."""
    lent: list[bool] = []

    async def lends(_data: bytes, context: Any) -> Any:
        lent.append(context.takes_pieces)
        return [bytes(3 << 20)] * 2 if lent[-1] else bytes(6 << 20)  # more than is kept for who does not read

    methods = {"lends": grpc.unary_unary_rpc_method_handler(lends)}
    running.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("large", methods),))
    with Raw(running) as raw:
        for count in range(1, 21):
            raw.call(*LENDS, stream=2 * count - 1)
            _until(lambda count=count: len(lent) == count)
    assert lent == [True] * 16 + [False] * 4
    _until(lambda: not any(one.calls for one in running.server._connections))
    with Raw(running) as raw:
        raw.call(*LENDS)
        _until(lambda: len(lent) == 21)
    assert lent[-1]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Eager:
    """A stream whose client takes whatever is sent at once."""

    def __init__(self, sizes: list[int]) -> None:
        fields = [(b"content-type", b"application/grpc")]
        self.head = SimpleNamespace(method="POST", path="/t/large", headers=SimpleNamespace(raw_items=lambda: fields))
        self.task = asyncio.current_task()
        self.peer, self.gone, self.on_gone = "", False, None
        self.sizes = sizes
        self._chunks = iter([prefix(0), None])

    async def chunk(self) -> bytes | None:
        return next(self._chunks)

    def begin(self, _fields: Any, *, end: bool = False) -> None:
        assert not end

    async def send(self, data: bytes) -> None:
        self.sizes.append(len(data))

    def end(self, _trailers: Any) -> None: ...

    def flush(self) -> None: ...


@pytest.mark.parametrize("pieces", [[1 << 26], [1 << 19] * 64, [3 << 20] * 20])
def test_a_large_answer_lets_others_have_their_turn(pieces: list[int]) -> None:
    async def large(_data: bytes, _context: Any) -> Any:
        return [bytes(size) for size in pieces]

    async def find(_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(large)

    async def answer() -> int:
        sizes: list[int] = []
        others: list[int] = []
        asyncio.get_running_loop().call_soon(lambda: others.append(len(sizes)))
        await Call(cast(Any, Eager(sizes)), Serving(find, 100)).run()
        assert sum(sizes) == sum(pieces) + len(prefix(0))
        return others[0]

    assert asyncio.run(answer()) < 12
