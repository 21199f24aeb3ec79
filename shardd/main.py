"""``shardd``: check what was asked before anything is imported or bound, then be the daemon."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from shardd.config import Config, ConfigError, read_config

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 2 if it cannot start as told. Once it has served the process ends here: 0 after SIGTERM, 70 if it
    must be replaced by a fresh one."""
    try:
        config = read_config(sys.argv[1:] if arguments is None else arguments, os.environ)
    except ConfigError as error:
        return _refuse(error)
    status = _serve(config)
    # Nothing is left to lose, and a replacement waits for this process to be gone: taking the interpreter down takes
    # seconds, and may hang in a library.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


if __name__ == "__main__":
    sys.exit(main())
