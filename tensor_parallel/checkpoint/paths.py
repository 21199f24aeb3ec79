"""Which files a load may open: regular files inside the model root, reached without symbolic links or ``..``."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tensor_parallel.errors import AccessDenied, CheckpointError


def confine(path: str | os.PathLike[str], model_root: str | os.PathLike[str] | None) -> Path:
    """Absolute form of ``path``, which may be relative to ``model_root``.

    Raises :class:`AccessDenied` for a path outside the root or through a symbolic link or ``..`` (even one that
    would lead back inside: what it leads to can change between the check and the read), :class:`CheckpointError` if
    nothing is there. Without a root any existing path is accepted: for a user's own process, never for a server.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise CheckpointError("the path of a checkpoint is empty or holds a null character")
    if model_root is None:
        found = Path(text).resolve()
        if not found.exists():
            raise CheckpointError(f"{text}: no such file or directory")
        return found
    if ".." in Path(text).parts:
        raise AccessDenied(f"{text}: '..' is not allowed in a model path")
    root = Path(os.path.realpath(model_root))
    wanted = Path(text) if os.path.isabs(text) else root / text
    inside = _relative_to_root(wanted, root, Path(os.path.abspath(model_root)))
    if inside is None:
        raise AccessDenied(f"{text}: outside the model root")
    current = root
    for part in inside.parts:
        current = current / part
        if current.is_symlink():
            raise AccessDenied(
                f"{text}: {current.relative_to(root)} is a symbolic link; model paths may not follow links"
            )
    if not current.exists():
        raise CheckpointError(f"{text}: no such file or directory in the model root")
    return current


def open_regular(path: Path, directory: Path) -> int:
    """File descriptor of ``path``, read only, for a file directly or indirectly inside ``directory``.

    The last component may not be a symbolic link and the file must be a regular one: no device, pipe or socket that
    would block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{_shown(path, directory)} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise AccessDenied(
                f"{_shown(path, directory)} is a symbolic link; checkpoints may not hold links"
            ) from None
        raise CheckpointError(f"{_shown(path, directory)} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{_shown(path, directory)} is not a regular file")
    return descriptor


def read_small(path: Path, directory: Path, limit: int) -> bytes:
    """Content of a small file such as a config. Raises :class:`CheckpointError` if it is larger than ``limit``
    bytes.
    """
    with os.fdopen(open_regular(path, directory), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{_shown(path, directory)} is larger than the {limit} bytes allowed for it")
    return data


def _relative_to_root(path: Path, root: Path, named_root: Path) -> Path | None:
    # The root itself may be named through links (a mount point); only what lies below it may not.
    for base in (root, named_root):
        if path.is_relative_to(base):
            return path.relative_to(base)
    return None


def _shown(path: Path, directory: Path) -> str:
    return str(path.relative_to(directory)) if path != directory and path.is_relative_to(directory) else path.name
