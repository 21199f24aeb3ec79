"""The head of a request: what gRPC says in it, checked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import grpc

from coordinator.http2.connection import MAX_HEADER_LIST
from coordinator.http2.fields import Metadata, metadata_of, seconds_of
from coordinator.http2.messages import ENCODINGS, IDENTITY, BodyError

Fields = list[tuple[bytes, bytes]]

_GRPC = b"application/grpc"


@dataclass(frozen=True, slots=True)
class Head:
    """``encoding`` of the messages; ``seconds`` until the deadline, None where there is none."""

    metadata: Metadata
    encoding: bytes
    seconds: float | None


class Heads:
    """The heads of a server's requests. One like the last is not looked at again."""

    def __init__(self) -> None:
        self._last: tuple[str, Fields, Head] | None = None

    def of(self, method: str, fields: Fields) -> Head:
        """Raises BodyError or MalformedField."""
        last = self._last
        if last is not None and last[0] == method and last[1] == fields:
            return last[2]
        head = _head(method, fields)
        self._last = (method, fields, head)
        return head


def _head(method: str, fields: Fields) -> Head:
    named = dict(fields)
    kind = named.get(b"content-type", b"")
    if method != "POST" or not (kind == _GRPC or kind.startswith((_GRPC + b"+", _GRPC + b";"))):
        raise BodyError(grpc.StatusCode.UNKNOWN, "this port speaks gRPC: POST, content-type application/grpc")
    if sum(map(len, chain.from_iterable(fields))) + 32 * len(fields) > MAX_HEADER_LIST:
        message = f"the call's metadata has more than {MAX_HEADER_LIST} bytes"
        raise BodyError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
    encoding = named.get(b"grpc-encoding", IDENTITY)
    if encoding not in ENCODINGS:
        shown = encoding[:32].decode("latin-1")
        raise BodyError(grpc.StatusCode.UNIMPLEMENTED, f"the compression {shown!r} is not known here")
    timeout = named.get(b"grpc-timeout")
    return Head(metadata_of(fields), encoding, None if timeout is None else seconds_of(timeout))
