"""The gRPC servers: the one with everything, and the one that answers health probes only."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2_grpc

from protos.tensor_parallel.v1 import shard_pb2_grpc
from shardd import security
from shardd.addresses import Address, BindError, check_free
from shardd.config import Config
from shardd.health import Health
from shardd.malformed import MalformedInterceptor
from shardd.title import name_thread

THREADS = 64
"""Made as they are needed. Each channel and each load in progress holds one; everything else answers at once."""


def make_server(config: Config, service: shard_pb2_grpc.ShardServicer, health: Health) -> tuple[grpc.Server, Address]:
    """The daemon's server and the address it is bound to; not started. Raises :class:`BindError`."""
    server = grpc.server(
        _pool(THREADS, "rpc"),
        interceptors=security.interceptors(config),
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # A coordinator on another host that vanished without a word is found out in half a minute.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
            ("grpc.http2.max_ping_strikes", 0),
        ],
    )
    shard_pb2_grpc.add_ShardServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    return server, _bind(server, config.listen, security.credentials(config))


def make_health_server(listen: Address, health: Health) -> tuple[grpc.Server, Address]:
    """A server of nothing but health, in plain text, for probes that cannot do TLS. Raises :class:`BindError`."""
    server = grpc.server(
        _pool(2, "probe"),
        interceptors=[MalformedInterceptor()],
        options=[("grpc.so_reuseport", 0)],
    )
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    return server, _bind(server, listen, None)


def _pool(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=name_thread, initargs=(name,))


def _bind(server: grpc.Server, listen: Address, tls: grpc.ServerCredentials | None) -> Address:
    check_free(listen)
    # A Unix socket is for this user alone.
    umask = os.umask(0o177) if listen.is_unix else None
    try:
        port = server.add_secure_port(str(listen), tls) if tls else server.add_insecure_port(str(listen))
    except RuntimeError:
        port = 0
    finally:
        if umask is not None:
            os.umask(umask)
    if port == 0:
        raise BindError(f"cannot listen on {listen}")
    return listen if listen.is_unix else Address(listen.host, port)
