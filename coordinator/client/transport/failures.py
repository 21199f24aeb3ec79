"""What a call fails with, in gRPC's terms: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, and
doc/http-grpc-status-mapping.md beside it."""

from __future__ import annotations

import os
from typing import Any

import grpc

from coordinator.http2.fields import Metadata

_REFUSED_STREAM = 7
# HTTP/2's error codes (RFC 9113, section 7); INTERNAL for all others
_OF_RESET = {
    _REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    8: grpc.StatusCode.CANCELLED,
    11: grpc.StatusCode.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    12: grpc.StatusCode.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}
# of answers without a status of gRPC; UNKNOWN for all others
_OF_HTTP = {
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallFailed(grpc.RpcError):
    """Has what ``errors.from_rpc`` reads of grpcio's own."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Metadata = ()) -> None:
        super().__init__(code, details)
        self._code = code
        self._details = details
        self._trailing = trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


class Unprocessed(CallFailed):
    """The server has certainly not begun with the request, which may be sent again on another connection."""

    def __init__(self, details: str) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, details)


def unavailable(details: str) -> CallFailed:
    return CallFailed(grpc.StatusCode.UNAVAILABLE, details)


def violation(name: str, what: object) -> CallFailed:
    """The server at ``name`` broke a rule of the protocol."""
    return CallFailed(grpc.StatusCode.INTERNAL, f"{name} breaks a rule of HTTP/2: {what}")


def of_reset(name: str, reason: int) -> CallFailed:
    """The stream was reset by RST_STREAM with the error ``reason``."""
    if reason == _REFUSED_STREAM:
        return Unprocessed(f"{name} refused the call")
    code = _OF_RESET.get(reason, grpc.StatusCode.INTERNAL)
    return CallFailed(code, f"Received RST_STREAM with error code {reason}")


def of_http(status: int | None, content_type: bytes) -> CallFailed:
    """An answer that ended without gRPC's own status."""
    if status != 200:
        code = _OF_HTTP.get(status or 0, grpc.StatusCode.UNKNOWN)
        return CallFailed(code, f"Received http2 header with status: {status}")
    shown = content_type[:64].decode("latin-1")
    return CallFailed(grpc.StatusCode.UNKNOWN, f"the answer (content-type {shown!r}) ended without a gRPC status")


def code_of(field: bytes) -> grpc.StatusCode:
    """What ``grpc-status`` says; UNKNOWN for what is none of gRPC's numbers."""
    number = int(field) if field.isdigit() and len(field) < 8 else -1
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)


def reason_of(error: OSError) -> str:
    return f"{os.strerror(error.errno)} ({error.errno})" if error.errno else str(error)
