"""The zip of a ``.pt2`` archive, read by us and never given to torch.

``torch.export.load`` unpickles what an archive marks as pickled. Here members are found through the zip's
directory, checked, and read as plain bytes; two readers of one file could disagree about what it holds, so nothing
else opens it.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensor_parallel.checkpoint.pt2_pickle import check_pickle
from tensor_parallel.checkpoint.stored import StoredFile
from tensor_parallel.errors import CheckpointError

MAX_MEMBERS = 200_000
MAX_JSON_BYTES = 512 << 20
MAX_SAMPLE_BYTES = 512 << 20
_SAMPLES = "data/sample_inputs/model.pt"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")

# What a member's name, below the archive's one top folder, may be, and what of it is used.
_USED = re.compile(
    r"models/model\.json|data/(weights/weight_\d+|constants/tensor_\d+|(weights|constants)/model_(weights|constants)_config\.json)"
)
_UNOPENED = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|\.format_version|\.storage_alignment"
    r"|data/sample_inputs/model\.pt|extra/[\w./ -]+"
)


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in the file."""

    name: str
    offset: int
    size: int
    crc: int


class Archive:
    """The members of a ``.pt2`` that holds one exported program named ``model``.

    Raises :class:`CheckpointError` for a file that is no such zip, members that are compressed, encrypted,
    overlapping, outside the file, named like a path out of it or like nothing an exported program has, and anything
    pickled. Extra files may be there; they are never opened. Sample inputs are a pickle by format: they are never
    unpickled, only searched for instructions that plain tensors do not need, since an archive that has them is
    meant to harm somebody.
    """

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self._members = _members(file)
        self._expect_text("archive_format", "pt2")
        self._expect_text("archive_version", "0")
        if "byteorder" in self._members:
            self._expect_text("byteorder", "little")
        if _SAMPLES in self._members:
            check_pickle(self.read(_SAMPLES, MAX_SAMPLE_BYTES), f"{file.name}: {_SAMPLES}")

    def member(self, name: str) -> Member:
        """Raises :class:`CheckpointError` if there is none of that name."""
        found = self._members.get(name)
        if found is None:
            raise CheckpointError(f"{self.file.name}: {name} is missing from the archive")
        return found

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small member, checked against its checksum."""
        member = self.member(name)
        if member.size > limit:
            raise CheckpointError(f"{self.file.name}: {name} has {member.size} bytes, at most {limit} are allowed")
        data = self.file.read(member.offset, member.size)
        if zlib.crc32(data) != member.crc:
            raise CheckpointError(f"{self.file.name}: {name} is damaged: its checksum does not match")
        return data

    def read_json(self, name: str) -> dict[str, Any]:
        """A member that is a JSON object."""
        try:
            value = json.loads(self.read(name, MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.file.name}: {name} is not valid JSON") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.file.name}: {name} is not a JSON object")
        return value

    def _expect_text(self, name: str, text: str) -> None:
        got = self.read(name, 64)
        if got.strip() != text.encode():
            raise CheckpointError(f"{self.file.name}: {name} is {got[:16]!r}, expected {text!r}")


def open_archive(path: Path) -> Archive:
    """Raises :class:`CheckpointError` for whatever :class:`Archive` refuses."""
    return Archive(StoredFile(path, path.parent))


def _members(file: StoredFile) -> Mapping[str, Member]:
    try:
        with zipfile.ZipFile(os.fdopen(os.dup(file.descriptor), "rb")) as directory:
            entries = directory.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{file.name} is not a .pt2 archive: {error}") from None
    if not entries or len(entries) > MAX_MEMBERS:
        raise CheckpointError(f"{file.name} has {len(entries)} members; an archive has 1 to {MAX_MEMBERS}")
    root = entries[0].filename.split("/")[0]
    members: dict[str, Member] = {}
    for entry in entries:
        name = _screened_name(entry, root, file)
        if name in members:
            raise CheckpointError(f"{file.name} holds {name} twice")
        members[name] = _located(entry, name, file)
    _refuse_overlap(members, file)
    return members


def _screened_name(entry: zipfile.ZipInfo, root: str, file: StoredFile) -> str:
    full = entry.filename
    if full != entry.orig_filename or not full.isprintable() or "\\" in full or full.startswith("/"):
        raise CheckpointError(f"{file.name} has a member with an unsafe name: {full!r}")
    name = full.removeprefix(f"{root}/")
    if name == full or ".." in full.split("/") or root in ("", "."):
        raise CheckpointError(f"{file.name}: member {full!r} lies outside the archive's folder")
    if name.startswith("data/aotinductor/"):
        raise CheckpointError(
            f"{file.name} holds compiled machine code ({name}), which is never run; save the exported program"
        )
    if re.fullmatch(r"data/(weights|constants)/[^/]*\.pt|data/constants/(custom_obj|opaque_obj)\w*", name):
        raise CheckpointError(f"{file.name}: {name} is pickled; pickles are never read")
    if re.fullmatch(r"models/.*", name) and name != "models/model.json":
        raise CheckpointError(f"{file.name}: {name}: only an archive with one program, named model, can be served")
    if not _USED.fullmatch(name) and not _UNOPENED.fullmatch(name):
        raise CheckpointError(f"{file.name} has a member that no exported program has: {name!r}")
    return name


def _located(entry: zipfile.ZipInfo, name: str, file: StoredFile) -> Member:
    if entry.flag_bits & 0x1:
        raise CheckpointError(f"{file.name}: {name} is encrypted")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{file.name}: {name} is compressed; torch.export.save writes members uncompressed")
    start = entry.header_offset
    if start < 0 or start + _LOCAL_HEADER.size > file.size:
        raise CheckpointError(f"{file.name}: {name} lies outside the file")
    header = _LOCAL_HEADER.unpack(file.read(start, _LOCAL_HEADER.size))
    name_length, extra_length = header[9], header[10]
    offset = start + _LOCAL_HEADER.size + name_length + extra_length
    if header[0] != b"PK\x03\x04" or offset + entry.file_size > file.size:
        raise CheckpointError(f"{file.name} is truncated or damaged at member {name}")
    if file.read(start + _LOCAL_HEADER.size, name_length) != entry.filename.encode():
        raise CheckpointError(f"{file.name}: the zip directory and its member disagree about {name}")
    return Member(name, offset, entry.file_size, entry.CRC)


def _refuse_overlap(members: Mapping[str, Member], file: StoredFile) -> None:
    end = 0
    for member in sorted(members.values(), key=lambda member: (member.offset, member.size)):
        if member.offset < end:
            raise CheckpointError(f"{file.name}: member {member.name} overlaps another")
        end = member.offset + member.size
