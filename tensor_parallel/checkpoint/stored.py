"""Where a tensor's bytes lie: a file held open, and an offset, dtype and shape in it.

Files are read with ``pread`` and never mapped: a checkpoint that is truncated or lies on a vanished network mount
then fails one load with an error that names it, where touching a mapping would kill the process with SIGBUS, and
every model in it.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from tensor_parallel.checkpoint.paths import open_regular
from tensor_parallel.errors import CheckpointError


class StoredFile:
    """One file of a checkpoint, open for positional reads from any thread; closed when nothing refers to it any
    more.
    """

    def __init__(self, path: Path, directory: Path, root: Path | None = None) -> None:
        self.name = str(path.relative_to(directory)) if path != directory else path.name
        self.descriptor = open_regular(path, directory, root)
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size
        self.bytes_read = 0
        """All that was asked of the file so far, by any thread."""
        self._counting = threading.Lock()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``. Raises :class:`CheckpointError` if the file has become shorter or cannot
        be read.
        """
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.name} cannot be read at byte {offset + done}: {error.strerror}"
                ) from error
            if got == 0:
                raise CheckpointError(f"{self.name} ends at byte {offset + done}: it was truncated after it was opened")
            done += got
        with self._counting:
            self.bytes_read += done

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)


@dataclass(frozen=True)
class StoredTensor:
    """A dense row-major tensor in a file. ``name`` is the checkpoint's own, for messages."""

    name: str
    file: StoredFile
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"tensor {self.name} in {self.file.name}"
