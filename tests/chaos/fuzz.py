"""Malformed, hostile and huge messages for every RPC, made from the descriptors alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

# What no message, however hostile, may be answered with; UNKNOWN is an exception that escaped a servicer.
FORBIDDEN = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
INTEGERS = (0, 1, -1, 2, 7, 127, 1 << 20, 1 << 31, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)
TEXTS = (
    "",
    "x",
    "chaos",
    "a" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "\x00",
    "💥",
    "%s%n",
    "os:system",
)


@dataclass(frozen=True)
class Method:
    path: str
    descriptor: MethodDescriptor


def methods(services: Iterable[ServiceDescriptor], skip: Iterable[str] = ()) -> list[Method]:
    found = [Method(f"/{s.full_name}/{m.name}", m) for s in services for m in s.methods]
    return [method for method in found if method.path not in set(skip)]


class Fuzzer:
    """A deterministic stream of hostile requests; every answer's status is counted by method."""

    def __init__(self, channel: grpc.Channel, seed: int) -> None:
        self.channel, self.chance = channel, random.Random(seed)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bad: list[str] = []

    def strike(self, method: Method) -> str:
        """One request to ``method``; returns the name of the status it was answered with."""
        payloads = [
            self._payload(method) for _ in range(self.chance.randint(0, 3) if method.descriptor.client_streaming else 1)
        ]
        streams = method.descriptor.client_streaming or method.descriptor.server_streaming
        status, details = self._send(method, payloads, 0.2 if streams else 5.0)  # a watch has no end of its own
        self.counts[method.path, status] += 1
        if status in FORBIDDEN or "Traceback" in details:
            self.bad.append(f"{method.path} {status}: {details[:300]} for {[p[:120] for p in payloads]}")
        return status

    def _send(self, method: Method, payloads: list[bytes], timeout: float) -> tuple[str, str]:
        kind = {
            (False, False): "unary_unary",
            (False, True): "unary_stream",
            (True, False): "stream_unary",
            (True, True): "stream_stream",
        }
        call = getattr(self.channel, kind[method.descriptor.client_streaming, method.descriptor.server_streaming])(
            method.path
        )
        request: Any = iter(payloads) if method.descriptor.client_streaming else payloads[0]
        try:
            answer = call(request, timeout=timeout)
            if method.descriptor.server_streaming:
                for _, _reply in zip(range(20), answer, strict=False):
                    pass
                answer.cancel()
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
        return "OK", ""

    def _payload(self, method: Method) -> bytes:
        roll = self.chance.random()
        if roll < 0.2:
            return self.chance.randbytes(self.chance.choice((0, 1, 3, 17, 200, 4096)))
        made = self._message(message_factory.GetMessageClass(method.descriptor.input_type)).SerializeToString()
        return made if roll < 0.7 or not made else self._mutated(made)

    def _mutated(self, raw: bytes) -> bytes:
        data = bytearray(raw)
        for _ in range(self.chance.randint(1, 4)):
            at = self.chance.randrange(len(data)) if data else 0
            action = self.chance.randrange(4)
            if action == 0 and data:
                data[at] ^= 1 << self.chance.randrange(8)
            elif action == 1:
                data[at:at] = self.chance.randbytes(self.chance.randint(1, 8))
            elif action == 2 and data:
                del data[at : at + self.chance.randint(1, 16)]
            elif data:
                data = data[:at] + data
        return bytes(data)

    def _message(self, cls: type[Message], depth: int = 0) -> Message:
        message = cls()
        for field in cls.DESCRIPTOR.fields:
            if depth > 3 or self.chance.random() < 0.35:
                continue
            self._fill(message, field, depth)
        return message

    def _fill(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value_field = field.message_type.fields_by_name["value"]
            target = getattr(message, field.name)
            for _ in range(self.chance.randint(1, 2)):
                key = self._scalar(field.message_type.fields_by_name["key"])
                if value_field.message_type is not None:
                    target[key].CopyFrom(
                        self._message(message_factory.GetMessageClass(value_field.message_type), depth + 1)
                    )
                else:
                    target[key] = self._scalar(value_field)
        elif field.message_type is not None:
            cls = message_factory.GetMessageClass(field.message_type)
            if field.is_repeated:
                getattr(message, field.name).extend(
                    self._message(cls, depth + 1) for _ in range(self.chance.randint(1, 3))
                )
            else:
                getattr(message, field.name).CopyFrom(self._message(cls, depth + 1))
        elif field.is_repeated:
            getattr(message, field.name).extend(self._scalar(field) for _ in range(self.chance.randint(1, 4)))
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return self.chance.randbytes(self.chance.choice((0, 1, 4, 64, 4096)))
            return self.chance.choice(TEXTS)
        if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return self.chance.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self.chance.random() < 0.5
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return self.chance.choice((0, 1, 2, 15, 99))
        bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
        unsigned = field.cpp_type in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
        low, high = (0, (1 << bits) - 1) if unsigned else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        return self.chance.choice([value for value in INTEGERS if low <= value <= high])


def rounds(fuzzer: Fuzzer, targets: list[Method], count: int) -> Iterator[str]:
    """``count`` strikes spread evenly over ``targets``."""
    for index in range(count):
        yield fuzzer.strike(targets[index % len(targets)])
