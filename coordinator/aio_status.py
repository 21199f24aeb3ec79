"""The status a server really gave to a stream of requests it ended early.

grpc.aio puts "INTERNAL: Internal error from Core" in its place when a write of the client fails because the server has
already answered (https://github.com/grpc/grpc/issues/36066): the caller would lose the code, the message and the hint
when to retry. The status that came first is kept here.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import grpc
from grpc.aio import AioRpcError, Metadata

_OVERWRITTEN = "Internal error from Core"


class FirstStatus:
    """Remembers the first status of one call; make it in the same turn of the event loop as the call."""

    def __init__(self, call: Any) -> None:
        self._seen: AioRpcError | None = None
        call.add_done_callback(self._done)

    def of(self, code: grpc.StatusCode, details: str | None) -> tuple[grpc.StatusCode, str]:
        """Code and details of the call, which gives these."""
        shown = self.instead_of(AioRpcError(code, Metadata(), Metadata(), details))
        return shown.code(), shown.details() or ""

    def instead_of(self, error: AioRpcError) -> AioRpcError:
        """What to raise for what the call raised."""
        if error.code() is not grpc.StatusCode.INTERNAL or error.details() != _OVERWRITTEN:
            return error
        if self._seen is not None:
            return self._seen
        # The write failed before any status came: as good as a lost connection.
        details = "the server ended the call before it had read the request"
        return AioRpcError(grpc.StatusCode.UNAVAILABLE, error.initial_metadata(), error.trailing_metadata(), details)

    def _done(self, call: Any) -> None:
        code, details = _at_once(call.code()), _at_once(call.details())
        if code is None or (code is grpc.StatusCode.INTERNAL and details == _OVERWRITTEN):
            return
        trailing = _at_once(call.trailing_metadata())
        self._seen = AioRpcError(code, Metadata(), trailing if trailing is not None else Metadata(), details)


def _at_once(answer: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives without waiting; None when it would have to wait."""
    try:
        answer.send(None)
    except StopIteration as ended:
        return ended.value
    answer.close()
    return None
