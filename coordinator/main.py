"""``coordinator``: check what was asked before anything else is imported or bound, then be the coordinator."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from coordinator.config import ConfigError, parse

REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 2 (and one line on stderr) if it cannot start as told."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C++ messages are no log lines; errors are exceptions here
        from coordinator.logging import configure
        from coordinator.process import serve

        configure(config.log_level, config.log_format)
        return asyncio.run(serve(config))
    except ConfigError as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
