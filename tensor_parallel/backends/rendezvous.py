"""Waiting for what other ranks put into a store, with this package's errors."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store

from tensor_parallel.errors import CollectiveTimeout, PeerLost


def wait_for_keys(store: Store, keys: Sequence[str], timeout: timedelta) -> None:
    """Return once all ``keys`` are set.

    Raises :class:`CollectiveTimeout` after ``timeout``, and :class:`PeerLost` when the process that keeps the store is
    gone.
    """
    try:
        store.wait(list(keys), timeout)
    except RuntimeError as error:
        detail = str(error).partition("\n")[0]
        if is_timeout(detail):
            raise CollectiveTimeout(f"waited {timeout} for {', '.join(keys)} in the store") from error
        raise PeerLost(f"the store is gone: {detail}") from error


def is_timeout(detail: str) -> bool:
    """Whether torch's message says that time ran out; its exceptions have no type for it."""
    lowered = detail.lower()
    return "timed out" in lowered or "timeout" in lowered
