"""A bell that any number of tasks can wait for: it says that something changed, never what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


class Signal:
    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()
        self._rung = 0

    def ring(self) -> None:
        self._rung += 1
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, limit: float) -> None:
        """Until the next ring, or ``limit`` seconds."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait((waiter,), timeout=limit)
        finally:
            self._waiters.discard(waiter)

    async def subscribe(self, limit: float) -> AsyncIterator[None]:
        """Yields at once, then after every ring (none is missed), and at least every ``limit`` seconds."""
        while True:
            seen = self._rung
            yield
            if self._rung == seen:
                await self.wait(limit)
