"""How the blocking client's calls travel, where it has the choice.

grpcio serves a blocking call from threads of its own; waking them costs as much as a small model's forward. To a server
in plaintext, unary calls go over sockets that the calling thread drives itself: one send, one or two receives. That is
``Channel``. All else is grpcio's: streams; TLS; channel options that the user gave; targets other than HOST:PORT and
unix:PATH; a proxy set in the environment (``grpc_proxy``, ``https_proxy``, ``http_proxy``) unless the target is on
this host; and platforms other than Linux with ``httpunk``. Calls, and the codes that they fail with, are the same.

Each call that runs has a connection to itself, and nobody reads those that are idle: what a server said meanwhile (that
it leaves, say) is heard before the next request is sent.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import grpc

from coordinator.client.connection import Connection

if TYPE_CHECKING:
    from coordinator.client.transport.channel import Channel

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # as grpcio reads them; it knows no others


def channel_to(connection: Connection) -> Channel | grpc.Channel:
    if connection.credentials is not None:
        return grpc.secure_channel(connection.target, connection.credentials, connection.options)
    return _direct(connection) or grpc.insecure_channel(connection.target, connection.options)


def _direct(connection: Connection) -> Channel | None:
    """None where it has to be grpcio."""
    proxied = not connection.local and any(map(os.environ.get, _PROXIES))
    if connection.customized or proxied or sys.platform != "linux":
        return None
    try:
        from coordinator.client.transport.address import Address
        from coordinator.client.transport.channel import Channel
    except ImportError:  # httpunk's
        return None
    address = Address.of(connection.target)
    return None if address is None else Channel(connection, address)
