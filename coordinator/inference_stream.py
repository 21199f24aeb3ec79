"""A stream of requests, worked on together and answered in the order asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

AHEAD = 64  # requests of one stream at work at a time; beyond, the client is not read (HTTP/2 holds it back)


async def answer_in_order(
    requests: AsyncIterator[bytes], one: Callable[[bytes], Coroutine[Any, Any, bytes]]
) -> AsyncGenerator[bytes, None]:
    """Yields ``one(request)`` for each request, in order; an exception of ``one`` ends the stream with it.

    Clients match answers to requests by their order, so a slow request holds back the answers behind it, but not the
    work.  Leaving early (the client went away) cancels what is under way; close the generator to be sure of that.
    """
    begun: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
    room = asyncio.Semaphore(AHEAD)
    tasks: set[asyncio.Task[bytes]] = set()

    async def read() -> None:
        try:
            async for data in requests:
                await room.acquire()
                task = asyncio.create_task(one(data))
                tasks.add(task)
                begun.put_nowait(task)
        finally:
            begun.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await begun.get()) is not None:
            yield await task
            tasks.discard(task)
            room.release()
        await reader
    finally:
        for running in (reader, *tasks):
            running.cancel()
        await asyncio.gather(reader, *tasks, return_exceptions=True)
