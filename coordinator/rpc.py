"""What every servicer wants to know about the RPC at hand: its id, its deadline, its trace."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import grpc

from coordinator.tracing import carrier_of
from coordinator.types import Answer, Buffer

REQUEST_ID = "x-request-id"
IN_PIECES = 256 << 10  # bytes of an answer from which on it is not put together before it is sent
# An id travels in metadata and log lines: printable ASCII, of a sane length.
_SAFE = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class Call:
    """``deadline`` is in the event loop's clock, None when the client set none. ``made``: the id is our own."""

    request_id: str
    deadline: float | None
    trace_context: dict[str, str]
    made: bool = False

    def named(self, given: str) -> Call:
        """The same call under the id of a message's own field, unless the metadata had one or it is not fit for one."""
        return replace(self, request_id=given, made=False) if self.made and given and _SAFE.fullmatch(given) else self


def answer_of(pieces: list[Buffer], context: grpc.aio.ServicerContext[Any, Any]) -> Answer:
    """The answer that ``pieces`` are one after another; a large one is left in them if the server takes that."""
    if getattr(context, "takes_pieces", False) and sum(map(len, pieces)) >= IN_PIECES:
        return pieces
    return b"".join(pieces)


def call_of(context: grpc.aio.ServicerContext[Any, Any], given: str = "") -> Call:
    """The id is that of the metadata, else ``given`` (a field of the request), else a new one."""
    metadata = context.invocation_metadata() or ()
    safe = given if given and _SAFE.fullmatch(given) else ""
    for key, value in metadata:
        if key == REQUEST_ID and isinstance(value, str) and _SAFE.fullmatch(value):
            safe = value
            break
    remaining = context.time_remaining()
    deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
    return Call(safe or os.urandom(16).hex(), deadline, carrier_of(metadata), made=not safe)
