"""``shardd``: check what was asked before anything is imported or bound, then be the daemon."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence

from shardd.config import Config, ConfigError, read_config

EXIT_USAGE = 2
EXIT_FINALISE_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 2 if it cannot start as told, 70 if it must be replaced by a fresh process."""
    try:
        config = read_config(sys.argv[1:] if arguments is None else arguments, os.environ)
    except ConfigError as error:
        return _refuse(error)
    status = _serve(config)
    # Nothing is left to lose: should a library hang while the interpreter shuts down, leave anyway.
    threading.Thread(target=_leave_soon, args=(status,), daemon=True).start()
    return status


def _serve(config: Config) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C++ messages are no log lines; errors reach us as exceptions
    from shardd import logging
    from shardd.addresses import BindError
    from shardd.daemon import Daemon
    from shardd.errors import StartError

    log = logging.configure(config.log_level, config.log_format, rank=config.rank)
    try:
        Daemon(config, log).run()
    except (BindError, StartError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"shardd: {error}", file=sys.stderr)
    return EXIT_USAGE


def _leave_soon(status: int) -> None:
    time.sleep(EXIT_FINALISE_SECONDS)
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
