"""Server reflection (v1 and v1alpha), so that grpcurl and its like list and call everything without protos.

Descriptors come from two pools: the Open Inference Protocol's, and the default one with all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection

from protos import inference

_Found = TypeVar("_Found")
_METHOD = "ServerReflectionInfo"
V1ALPHA = "grpc.reflection.v1alpha.ServerReflection"
V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Serves reflection for ``services`` (full names) and for itself."""
    names = [*services, V1, V1ALPHA]
    pools = MergedPools([inference.pool, _v1_pool(), descriptor_pool.Default()])
    servicer = reflection.ReflectionServicer(names, pool=pools)
    # Both versions have the same messages on the wire; only the package differs.
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {_METHOD: handler}) for name in (V1, V1ALPHA))
    )


class MergedPools:
    """The lookups of a DescriptorPool that reflection makes, tried in each pool in turn; KeyError when none knows."""

    def __init__(self, pools: Sequence[descriptor_pool.DescriptorPool]) -> None:
        self._pools = pools

    def FindFileByName(self, name: str) -> Any:
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        return self._first(lambda pool: pool.FindFileContainingSymbol(symbol))

    def FindMessageTypeByName(self, name: str) -> Any:
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:
        return self._first(lambda pool: pool.FindExtensionByNumber(_in(pool, message), number))

    def FindAllExtensions(self, message: Any) -> list[Any]:
        return list(self._first(lambda pool: pool.FindAllExtensions(_in(pool, message))))

    def _first(self, find: Callable[[Any], _Found]) -> _Found:
        for pool in self._pools:
            try:
                return find(pool)
            except KeyError:
                continue
        raise KeyError("no pool knows this name")


def _in(pool: Any, message: Any) -> Any:
    """``message``'s descriptor as ``pool`` has it: pools refuse each other's. Raises KeyError when it has none."""
    return pool.FindMessageTypeByName(message.full_name)


def _v1_pool() -> descriptor_pool.DescriptorPool:
    """grpcio-reflection ships v1alpha alone; v1 is the same file in another package."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = "grpc.reflection.v1"
    file.ClearField("options")

    def renamed(type_name: str) -> str:
        return type_name.replace(".grpc.reflection.v1alpha.", ".grpc.reflection.v1.")

    for message in file.message_type:
        for field in message.field:
            if field.type_name:  # a scalar's must stay unset
                field.type_name = renamed(field.type_name)
    for service in file.service:
        for method in service.method:
            method.input_type, method.output_type = renamed(method.input_type), renamed(method.output_type)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
