"""Who may call: TLS, client certificates and the bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from shardd.config import Config
from shardd.malformed import MalformedInterceptor


class TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets a call through only with ``authorization: Bearer <token>``. The token is compared in constant time."""

    def __init__(self, token: str) -> None:
        self._wanted = f"Bearer {token}".encode()
        self._refusal: Any = grpc.stream_stream_rpc_method_handler(_refuse)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        for key, value in handler_call_details.invocation_metadata or ():
            if key == "authorization":
                given = value.encode() if isinstance(value, str) else value
                if hmac.compare_digest(given, self._wanted):
                    return continuation(handler_call_details)
        return self._refusal


def _refuse(_requests: Iterator[Any], context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is needed")
    raise AssertionError("abort raises")


def interceptors(config: Config) -> list[grpc.ServerInterceptor]:
    """Outermost first."""
    token = [TokenInterceptor(config.token)] if config.token else []
    return [*token, MalformedInterceptor()]


def credentials(config: Config) -> grpc.ServerCredentials | None:
    """TLS as configured; None for plain text. Certificates are read again for connections after they were replaced."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    source = _Certificates(config)
    return grpc.dynamic_ssl_server_credentials(
        source.current(), source.changed, require_client_authentication=config.tls_client_ca is not None
    )


class _Certificates:
    """The certificate files, and whether they have changed since they were last read."""

    def __init__(self, config: Config) -> None:
        self._files = [path for path in (config.tls_cert, config.tls_key, config.tls_client_ca) if path is not None]
        self._read: tuple[bytes, ...] = ()

    def current(self) -> grpc.ServerCertificateConfiguration:
        self._read = tuple(path.read_bytes() for path in self._files)
        return self._configuration()

    def changed(self) -> Any:
        """A new configuration, or None to keep the last; asked for by gRPC at every handshake."""
        try:
            now = tuple(path.read_bytes() for path in self._files)
        except OSError:
            return None
        if now == self._read:
            return None
        self._read = now
        return self._configuration()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, *authorities = self._read
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities[0] if authorities else None)
