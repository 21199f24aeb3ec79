"""The Python client. Importing it needs grpc and numpy alone: neither torch nor any of the server.

>>> from coordinator.client import Client
>>> with Client(target) as client:
...     client.health()["serving"]
True
"""

from coordinator.client.aio import AsyncClient
from coordinator.client.calls import load_options
from coordinator.client.connection import Tls
from coordinator.client.errors import InvalidInputError, RequestError
from coordinator.client.memory import SharedRegion
from coordinator.client.sync import Client
from coordinator.retry import RetryPolicy

__all__ = [
    "AsyncClient",
    "Client",
    "InvalidInputError",
    "RequestError",
    "RetryPolicy",
    "SharedRegion",
    "Tls",
    "load_options",
]
