"""HTTP/2 header fields and what gRPC makes of them: metadata, deadlines, status messages."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote_to_bytes

Metadata = tuple[tuple[str, str | bytes], ...]

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_NOT_METADATA = frozenset((b"content-type", b"te", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"))
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")  # left as they are in grpc-message


class MalformedField(ValueError):
    """Names the field."""


def metadata_of(fields: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """The fields that are metadata, in order; those named ``*-bin`` as bytes. Raises MalformedField."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in fields:
        if name in _NOT_METADATA:
            continue
        key = name.decode("latin-1")
        if name.endswith(b"-bin"):
            found += ((key, _unbase64(key, part.strip())) for part in value.split(b","))
        else:
            found.append((key, value.decode("latin-1")))
    return tuple(found)


def fields_of(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str, str]]:
    """Metadata as header fields. Raises ValueError for text that no field can carry."""
    made = []
    for key, value in metadata:
        if key.endswith("-bin"):
            raw = value if isinstance(value, bytes) else value.encode()
            made.append((key, base64.b64encode(raw).rstrip(b"=").decode()))
        else:
            made.append((key, value if isinstance(value, str) else value.decode("ascii")))
    return made


def seconds_of(timeout: bytes) -> float:
    """What ``grpc-timeout`` says. Raises MalformedField."""
    match = _TIMEOUT.fullmatch(timeout)
    if match is None:
        raise MalformedField(f"grpc-timeout {timeout[:32]!r} is no timeout")
    return int(match[1]) * _SECONDS[match[2]]


def timeout_field(seconds: float) -> str:
    """``seconds``, more than 0, as ``grpc-timeout`` carries it: at most eight digits, rounded up."""
    for unit, size in (("u", 1e-6), ("m", 1e-3), ("S", 1.0)):
        if (count := math.ceil(seconds / size)) < 10**8:
            return f"{count}{unit}"
    return "99999999S"


def message_field(message: str) -> str:
    """``message`` as ``grpc-message`` carries it: percent-encoded UTF-8."""
    return quote(message, safe=_PLAIN, errors="replace")


def message_of(field: bytes) -> str:
    """What ``grpc-message`` says."""
    return unquote_to_bytes(field).decode("utf-8", "replace")


def _unbase64(key: str, value: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        raise MalformedField(f"the value of {key} is no base64") from None
