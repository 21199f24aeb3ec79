"""A network that misbehaves: TCP relays whose connections can be cut, delayed and silenced while they are in use."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

CHUNK = 1 << 16


class Link:
    """Relays ``127.0.0.1:port`` to ``target``. Its state is changed from any thread, through `Network`."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._open = asyncio.Event()
        self._open.set()
        self._refusing = False
        self._delay = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        self.relayed = 0

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def cut(self, seconds: float) -> None:
        """Every connection is reset, and new ones are refused for so long."""
        self._refusing = True
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(seconds)
        self._refusing = False

    async def delay(self, seconds: float, by: float) -> None:
        """Everything arrives ``by`` seconds later, for so long."""
        self._delay = by
        await asyncio.sleep(seconds)
        self._delay = 0.0

    async def silence(self, seconds: float) -> None:
        """Nothing arrives, and nothing is said about it; afterwards all of it does."""
        self._open.clear()
        await asyncio.sleep(seconds)
        self._open.set()

    async def close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._refusing:
                writer.transport.abort()
                return
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        finally:
            self._writers.discard(writer)
        pairs = ((reader, far_writer), (far_reader, writer))
        self._writers |= {writer, far_writer}
        jobs = [asyncio.create_task(self._relay(*pair)) for pair in pairs]
        self._tasks |= set(jobs)
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, far_writer):
            end.transport.abort()
        self._writers -= {writer, far_writer}
        self._tasks -= set(jobs)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while data := await reader.read(CHUNK):
                await self._open.wait()
                if self._delay:
                    await asyncio.sleep(self._delay)
                writer.write(data)
                self.relayed += len(data)
                await writer.drain()


class Network:
    """One link to each of ``targets``, run by a thread of its own while entered."""

    def __init__(self, targets: list[str]) -> None:
        self._targets = targets
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.links: list[Link] = []

    @property
    def addresses(self) -> list[str]:
        return [link.address for link in self.links]

    def strike(self, rank: int, fault: Callable[[Link], Coroutine[Any, Any, None]]) -> None:
        """Begins ``fault`` at a link and returns when it is over."""
        asyncio.run_coroutine_threadsafe(fault(self.links[rank]), self._loop).result(60)

    def __enter__(self) -> Network:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result(10)
        return self

    async def _begin(self) -> None:
        self.links = [Link(target) for target in self._targets]
        for link in self.links:
            await link.listen()

    def __exit__(self, *about: object) -> None:
        for link in self.links:
            asyncio.run_coroutine_threadsafe(link.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
