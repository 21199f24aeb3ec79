"""Copies what a child says to our standard error and to a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path


class Tee:
    """Make it, give ``sink`` to the child, then call `started`; it closes itself when the child's end closes."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._source, self.sink = os.pipe()
        os.set_blocking(self._source, False)

    def started(self) -> None:
        os.close(self.sink)
        asyncio.get_running_loop().add_reader(self._source, self._copy)

    def _copy(self) -> None:
        try:
            data = os.read(self._source, 1 << 16)
        except BlockingIOError:
            return
        for target in (self._file, sys.stderr.fileno()) if data else ():
            with contextlib.suppress(OSError):  # a full disk or a closed terminal must not stop the cluster
                os.write(target, data)
        if not data:
            asyncio.get_running_loop().remove_reader(self._source)
            os.close(self._source)
            os.close(self._file)
