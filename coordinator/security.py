"""TLS and bearer tokens: for the coordinator's own ports, and towards the daemons."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from coordinator.config import Config, ConfigError, TlsConfig

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

AUTHORIZATION = "authorization"
# Probes of Kubernetes and load balancers carry no token; all that health tells is SERVING or not.
EXEMPT = ("/grpc.health.v1.Health/",)


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials | None:
    """None without TLS. Raises ConfigError when a file cannot be read."""
    if tls.cert is None or tls.key is None:
        return None
    pair = (_read(tls.key), _read(tls.cert))
    ca = _read(tls.ca) if tls.ca is not None else None
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def channel_credentials(tls: TlsConfig) -> grpc.ChannelCredentials | None:
    """None without TLS. Raises ConfigError when a file cannot be read."""
    if not tls.enabled:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca) if tls.ca is not None else None,
        private_key=_read(tls.key) if tls.key is not None else None,
        certificate_chain=_read(tls.cert) if tls.cert is not None else None,
    )


def _read(path: Any) -> bytes:
    try:
        return bytes(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def shard_metadata(config: Config) -> tuple[tuple[str, str], ...]:
    """What every call to a daemon carries."""
    return ((AUTHORIZATION, f"Bearer {config.shard_token}"),) if config.shard_token is not None else ()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets only calls with ``authorization: Bearer <token>`` through; health checks are exempt."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(details)
        if handler is None or details.method.startswith(EXEMPT):
            return handler
        given = next((value for key, value in details.invocation_metadata if key == AUTHORIZATION), None)
        raw = given.encode() if isinstance(given, str) else given
        if raw is not None and hmac.compare_digest(raw, self._expected):
            return handler
        return _refuse(handler, "a bearer token is required" if raw is None else "the bearer token is wrong")


def _refuse(handler: Handler, message: str) -> Handler:
    async def unary(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    async def stream(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        yield b""  # makes this an asynchronous generator

    make = {
        (False, False): (grpc.unary_unary_rpc_method_handler, unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream),
    }
    build, behavior = make[handler.request_streaming, handler.response_streaming]
    refusal: Handler = build(behavior)
    return refusal
