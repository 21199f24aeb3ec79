"""``coordinator``: check what was asked before anything else is imported or bound, then be the coordinator."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

from coordinator.config import ConfigError, parse

REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 2 (and one line on stderr) if it cannot start as told."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C++ messages are no log lines; errors are exceptions here
        from coordinator.logging import configure
        from coordinator.process import serve
        from protos.allocator import keep_freed_memory

        keep_freed_memory()
        configure(config.log_level, config.log_format)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(serve(config))
    except ConfigError as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return REFUSED


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it can be had: a request passes the loop a dozen times, and each pass costs half as much."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return None
    return cast(Callable[[], asyncio.AbstractEventLoop], uvloop.new_event_loop)


if __name__ == "__main__":
    sys.exit(main())
