"""The one exception that calls raise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import grpc

RETRY_AFTER = "retry-after-ms"
REQUEST_ID = "x-request-id"


class RequestError(grpc.RpcError):
    """A call failed. It is a ``grpc.RpcError``, so handlers written for plain gRPC catch it as well.

    ``code()`` is the ``grpc.StatusCode``, ``details()`` the message, ``request_id`` the id by which the logs of the
    coordinator and of every rank know the call, ``retry_after`` the seconds after which the server thinks that a retry
    may help (None: it gave no hint).
    """

    def __init__(
        self, code: grpc.StatusCode, details: str, *, request_id: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(code, details)
        self._code = code
        self._details = details
        self.request_id = request_id
        self.retry_after = retry_after

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def __str__(self) -> str:
        suffix = f" (request {self.request_id})" if self.request_id else ""
        return f"{self._code.name}: {self._details}{suffix}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self._code, self._details, self.request_id, self.retry_after)


def _rebuild(code: grpc.StatusCode, details: str, request_id: str, retry_after: float | None) -> RequestError:
    return RequestError(code, details, request_id=request_id, retry_after=retry_after)


class InvalidInputError(RequestError, ValueError):
    """The input cannot be sent as a tensor at all; found before anything was sent."""

    def __init__(self, details: str, request_id: str = "") -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, details, request_id=request_id)

    def __reduce__(self) -> tuple[object, ...]:
        return InvalidInputError, (self._details, self.request_id)


def from_rpc(error: grpc.RpcError, request_id: str = "") -> RequestError:
    """Translates what gRPC raised; the server's request id and retry hint come in the trailing metadata."""
    if isinstance(error, RequestError):
        return error
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = error.details() if hasattr(error, "details") else str(error)
    if code is grpc.StatusCode.CANCELLED:
        # Our own cancellation is no RpcError: a server that ends takes back what it had not yet handed to anybody.
        code, details = grpc.StatusCode.UNAVAILABLE, f"the server ended the call: {details}"
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    metadata: dict[str, str | bytes] = dict(cast(Iterable[Any], trailing or ()))
    return RequestError(
        code,
        details or "",
        request_id=_text(metadata.get(REQUEST_ID)) or request_id,
        retry_after=_seconds(metadata.get(RETRY_AFTER)),
    )


def _text(value: str | bytes | None) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value or ""


def _seconds(milliseconds: str | bytes | None) -> float | None:
    text = _text(milliseconds)
    return int(text) / 1000 if text.isascii() and text.isdigit() else None
