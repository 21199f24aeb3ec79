"""``shardctl``: the cluster from a shell."""

from coordinator.cli.app import main

__all__ = ["main"]
