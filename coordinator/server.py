"""The coordinator's ports: all services on the main one, and health alone on a plaintext one for probes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
from grpc_health.v1 import health_pb2_grpc

from coordinator import health_service, service
from coordinator.config import Config, ConfigError
from coordinator.core import Core
from coordinator.health_service import HealthService
from coordinator.inference_service import inference_handler
from coordinator.reflection import add_reflection
from coordinator.security import TokenInterceptor, server_credentials
from coordinator.service import CoordinatorService
from coordinator.tracing import Tracing
from protos.inference import SERVICE_NAME as INFERENCE
from protos.malformed import AsyncMalformedInterceptor

if TYPE_CHECKING:
    from coordinator.http2.server import Server as Http2Server

AnyServer: TypeAlias = "grpc.aio.Server | Http2Server"


class Server:
    """Bound at once, so that a port in use stops the start; serves after ``start``."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError when a port is taken or a certificate cannot be used."""
        interceptors: list[Any] = [AsyncMalformedInterceptor()]
        if config.token is not None:
            interceptors.append(TokenInterceptor(config.token))
        credentials = server_credentials(config.tls)
        self._main = _server(config.max_message_bytes, interceptors, secure=credentials is not None)
        self._health: AnyServer | None = None
        self.address = _bind(self._main, config.listen, credentials, "listen")
        self.health_address: str | None = None
        if config.health_listen is not None:
            self._health = _server(4096, [AsyncMalformedInterceptor()], secure=False)
            self.health_address = _bind(self._health, config.health_listen, None, "health-listen")

    async def start(self, core: Core, tracing: Tracing) -> None:
        self._main.add_generic_rpc_handlers((CoordinatorService(core, tracing).handler(),))
        self._main.add_generic_rpc_handlers((inference_handler(core, tracing),))
        add_reflection(cast(grpc.aio.Server, self._main), (service.SERVICE, INFERENCE, health_service.SERVICE))
        for server in self._servers():
            health_pb2_grpc.add_HealthServicer_to_server(HealthService(core), cast(grpc.aio.Server, server))
            await server.start()

    async def stop(self, grace: float) -> None:
        """Health goes last: it says NOT_SERVING for as long as there is something to say."""
        for server in self._servers():
            await server.stop(grace)

    def _servers(self) -> list[AnyServer]:
        return [server for server in (self._main, self._health) if server is not None]


def _server(max_message_bytes: int, interceptors: Sequence[Any], *, secure: bool) -> AnyServer:
    """Our own, which answers sooner; gRPC's for TLS, and where there is no httpunk."""
    if not secure:
        with contextlib.suppress(ImportError):
            from coordinator.http2.server import Server as Http2Server

            return Http2Server(interceptors, max_message_bytes)
    options = (
        ("grpc.so_reuseport", 0),  # a port belongs to one coordinator
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Clients may keep idle connections alive as they like.
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
    )
    return grpc.aio.server(interceptors=interceptors, options=options)


def _bind(server: AnyServer, address: str, credentials: grpc.ServerCredentials | None, flag: str) -> str:
    """Returns the address with the port that was bound."""
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            assert isinstance(server, grpc.aio.Server)
            port = server.add_secure_port(address, credentials)
    except (RuntimeError, OSError):
        raise ConfigError(f"--{flag} {address} cannot be bound: {_why(address)}") from None
    if port == 0:
        raise ConfigError(f"--{flag} {address} cannot be bound: {_why(address)}")
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _why(address: str) -> str:
    """gRPC does not say; binding once more by hand does."""
    if address.startswith("unix:"):
        return "the path is in use, or not writable"
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(target)
    except OSError as error:
        return error.strerror or str(error)
    return "the address is not usable, or the certificate is not"


def write_port_file(path: Path, address: str) -> None:
    """Atomically: whoever sees the file sees the whole address. Raises ConfigError."""
    temporary = path.with_name(path.name + f".{os.getpid()}")
    try:
        temporary.write_text(address + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"--port-file {path} cannot be written: {error.strerror}") from None


def identity(address: str) -> str:
    """Who owns the ranks: whoever listens on this address of this host.

    The kernel gives an address to one process at a time. So a coordinator that was killed and started again on its port
    is the same owner and need not wait for its own lease to lapse, while two that live at once never share an identity.
    """
    boot = _read("/proc/sys/kernel/random/boot_id") or socket.gethostname()
    network = os.readlink("/proc/self/ns/net") if os.path.exists("/proc/self/ns/net") else ""
    digest = hashlib.sha256(f"{boot}|{network}|{address}".encode()).hexdigest()[:12]
    return f"{socket.gethostname()}/{address}/{digest}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
