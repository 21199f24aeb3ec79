"""Protobuf messages whose large byte fields are neither parsed nor copied.

``lift`` cuts chosen byte fields out of a serialised message: the small rest goes through protobuf as ever, and each
payload is a memoryview of the bytes that arrived.  ``nested`` and ``payload`` go the other way: they yield the pieces
of a message, which one ``b"".join`` turns into bytes, so that a payload is copied once.

Knows nothing about our messages: a ``Path`` names the fields by number. The encoding is that of
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Union

from coordinator.types import Buffer

# What to lift: field number -> the path inside that message, or ONE / MANY for the byte field itself.
# ONE yields one entry for each occurrence of the message that holds it (None when the field is absent);
# MANY yields one entry for each occurrence of the field.
Path = Mapping[int, Union["Path", str]]
ONE = "one"
MANY = "many"

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
SMALL = 8192  # bytes of a message; below, protobuf's own copy of the payloads is cheaper than walking the fields here


class Malformed(ValueError):
    """The bytes are no protobuf message."""


def lift(message: Buffer, path: Path) -> tuple[bytes, list[memoryview | None]]:
    """Returns the message without the fields that ``path`` names, and those fields in order of appearance.

    Raises Malformed; whatever else is wrong with the small rest, protobuf finds.
    """
    payloads: list[memoryview | None] = []
    return b"".join(_lift(memoryview(message), path, payloads)), payloads


def _lift(view: memoryview, path: Path, payloads: list[memoryview | None]) -> list[Buffer]:
    kept: list[Buffer] = []
    single: memoryview | None = None
    wants_one = ONE in path.values()
    position, pending, end = 0, 0, len(view)
    while position < end:
        start = position
        tag, position = _varint(view, position, end)
        tagged, kind = position, tag & 7
        if kind == LENGTH:
            size, position = _varint(view, position, end)
            stop = position + size
            if stop > end:
                raise Malformed("a field runs past the end of its message")
            step = path.get(tag >> 3)
            if step is not None:
                kept.append(view[pending:start])
                pending = stop
                if step is ONE:
                    single = view[position:stop]
                elif step is MANY:
                    payloads.append(view[position:stop])
                else:
                    inner = _lift(view[position:stop], step, payloads)  # type: ignore[arg-type]
                    kept += (view[start:tagged], varint(sum(map(len, inner))), *inner)
            position = stop
        elif kind == VARINT:
            _, position = _varint(view, position, end)
        elif kind == FIXED64:
            position += 8
        elif kind == FIXED32:
            position += 4
        else:
            raise Malformed(f"wire type {kind} is not supported")
    if position != end:
        raise Malformed("the message is cut off")
    if wants_one:
        payloads.append(single)
    kept.append(view[pending:])
    return kept


def _varint(view: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise Malformed("a number is too long")
    raise Malformed("the message is cut off")


def varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """Field ``field``, a number that is not negative."""
    return varint(field << 3 | VARINT) + varint(value)


@lru_cache(4096)
def _beginning(number: int, size: int) -> bytes:
    """What stands before the ``size`` bytes of field ``number``."""
    return varint(number << 3 | LENGTH) + varint(size)


def nested(number: int, pieces: Iterable[Buffer]) -> list[Buffer]:
    """The pieces of field ``number``, a message whose own pieces are ``pieces`` (bytes each: len() is their size)."""
    inner = list(pieces)
    return [_beginning(number, sum(map(len, inner))), *inner]


def payload(number: int, data: Buffer) -> list[Buffer]:
    """The pieces of byte field ``number``."""
    return [_beginning(number, len(data)), data]


def flat(data: Buffer) -> memoryview:
    """``data`` as bytes, so that len() is its size."""
    view = memoryview(data)
    if view.ndim == 1 and view.format == "B":
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")
