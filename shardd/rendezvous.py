"""Where the ranks meet: every daemon has an address for a store, bound before torch is there to serve it."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from shardd.addresses import Address, listening_socket, reachable_host
from shardd.config import Config


@dataclass(frozen=True)
class Rendezvous:
    """``host`` is this rank's address among the ranks; ``listener`` listens there for users of its store."""

    host: str
    listener: socket.socket
    address: str


def reserve(config: Config) -> Rendezvous:
    """Bind the store's port on the address that peers reach. Raises :class:`~shardd.addresses.BindError`."""
    host = reachable_host(config.listen, config.advertise, config.interface)
    listener = listening_socket(host)
    return Rendezvous(host, listener, str(Address(host, listener.getsockname()[1])))
