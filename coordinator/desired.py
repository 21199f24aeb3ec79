"""The desired state: which models are to be served, in one small file that is replaced atomically.

It is all that the coordinator remembers, so that a reboot of everything knows what to serve. The directory is locked
while a coordinator runs; the kernel frees the lock when it dies.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from coordinator.catalog import Digests, ModelVersion
from coordinator.config import ConfigError
from protos.tensor_parallel.v1 import coordinator_pb2 as pb

FORMAT = 1
FILE = "desired.json"


class DesiredState:
    """``directory`` None keeps nothing."""

    def __init__(self, directory: Path | None) -> None:
        """Raises ConfigError when the directory cannot be used, or another coordinator is using it."""
        self._directory = directory
        self._lock: int | None = None
        self.unloaded: list[ModelVersion] = []
        """Read by ``load``: what could be loaded again by name."""
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--state-dir {directory} is in use by another coordinator") from None
        except OSError as error:
            raise ConfigError(f"--state-dir {directory} cannot be used: {error.strerror}") from None

    @property
    def path(self) -> Path | None:
        return self._directory / FILE if self._directory is not None else None

    def load(self, world_size: int) -> list[ModelVersion] | None:
        """None when there is no file yet. Raises ConfigError when the file is not ours or damaged."""
        if self.path is None or not self.path.exists():
            return None
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise ConfigError(f"{self.path} has format {state['format']!r}, this version reads {FORMAT}")
            self.unloaded = [_read(model, world_size) for model in state.get("unloaded", [])]
            return [_read(model, world_size) for model in state["models"]]
        except (OSError, ValueError, KeyError, TypeError, json_format.ParseError) as error:
            raise ConfigError(f"{self.path} cannot be read as a desired state: {error!r}") from None

    def save(self, models: Iterable[ModelVersion], world_size: int, unloaded: Iterable[ModelVersion] = ()) -> None:
        """Blocks until the file is on disk. Raises OSError."""
        if self.path is None or self._directory is None:
            return
        state = {
            "format": FORMAT,
            "models": [_write(model, world_size) for model in models],
            "unloaded": [_write(model, world_size) for model in unloaded],
        }
        temporary = self._directory / (FILE + ".new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(state, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _write(model: ModelVersion, world_size: int) -> dict[str, Any]:
    written: dict[str, Any] = {
        "name": model.name,
        "version": model.version,
        "path": model.path,
        "options": json_format.MessageToDict(model.options, preserving_proto_field_name=True),
    }
    if model.digests is not None:
        written["digests"] = {
            "source": model.digests.source,
            "plan": model.digests.plan,
            "shards": list(model.digests.shards),
            "world_size": world_size,
        }
    return written


def _read(model: dict[str, Any], world_size: int) -> ModelVersion:
    written = model.get("digests")
    digests = None
    if written is not None and written["world_size"] == world_size:
        digests = Digests(str(written["source"]), str(written["plan"]), tuple(map(str, written["shards"])))
    return ModelVersion(
        name=str(model["name"]),
        version=str(model["version"]),
        path=str(model["path"]),
        options=json_format.ParseDict(model["options"], pb.LoadOptions()),
        digests=digests,
        served=written is not None,
    )
