"""What is installed, for metadata and metrics."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "tensor-parallel-service"


def version() -> str:
    """The installed version; "unknown" when run from a tree that was never installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
