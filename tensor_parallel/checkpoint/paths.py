"""Which files a load may open: regular files inside the model root.

A symbolic link may lead from one place of the root to another, as in the Hugging Face hub's cache, where every file of
a snapshot is a link to a blob; never out of it. What a link leads to can change between a check and a read, so the file
that was opened is checked, not the name that it was opened by.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tensor_parallel.errors import AccessDenied, CheckpointError


def confine(path: str | os.PathLike[str], model_root: str | os.PathLike[str] | None) -> Path:
    """Absolute form of ``path``, which may be relative to ``model_root``.

    Raises :class:`AccessDenied` for a path outside the root, by ``..`` or through a symbolic link that leads out of it,
    :class:`CheckpointError` if nothing is there. Without a root any existing path is accepted: for a user's own
    process, never for a server.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise CheckpointError("the path of a checkpoint is empty or holds a null character")
    if model_root is None:
        return _existing(Path(text), text)
    if ".." in Path(text).parts:
        raise AccessDenied(f"{text}: '..' is not allowed in a model path")
    root = Path(os.path.realpath(model_root))
    wanted = Path(text) if os.path.isabs(text) else root / text
    if not any(wanted.is_relative_to(base) for base in (root, Path(os.path.abspath(model_root)))):
        raise AccessDenied(f"{text}: outside the model root")
    # Before it is known whether anything is there: whoever may not read a place may not learn what it holds either.
    if not Path(os.path.realpath(wanted)).is_relative_to(root):
        raise AccessDenied(f"{text}: a symbolic link leads out of the model root")
    return _existing(wanted, text)


def _existing(path: Path, text: str) -> Path:
    """What ``path`` really is, with every link followed."""
    try:
        return path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{text}: no such file or directory") from None
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, no permission
        shown = text if len(text) < 200 else f"{text[:200]}..."
        raise CheckpointError(f"{shown}: {getattr(error, 'strerror', None) or error}") from None


def open_regular(path: Path, directory: Path, root: Path | None = None) -> int:
    """File descriptor of ``path``, read only, for a regular file inside ``root`` (``directory`` when None).

    Raises :class:`AccessDenied` if a link led out of it, :class:`CheckpointError` for anything but a regular file: no
    device, pipe or socket that would block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{_shown(path, directory)} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{_shown(path, directory)} cannot be opened: {error.strerror}") from None
    opened = Path(os.path.realpath(f"/proc/self/fd/{descriptor}"))
    if not opened.is_relative_to(os.path.realpath(root or directory)):
        os.close(descriptor)
        raise AccessDenied(f"{_shown(path, directory)} is a symbolic link that leads out of the model root")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{_shown(path, directory)} is not a regular file")
    return descriptor


def read_small(path: Path, directory: Path, limit: int, root: Path | None = None) -> bytes:
    """Content of a small file such as a config. Raises :class:`CheckpointError` if it is larger than ``limit``
    bytes.
    """
    with os.fdopen(open_regular(path, directory, root), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{_shown(path, directory)} is larger than the {limit} bytes allowed for it")
    return data


def _shown(path: Path, directory: Path) -> str:
    return str(path.relative_to(directory)) if path != directory and path.is_relative_to(directory) else path.name
