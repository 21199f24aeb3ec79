"""``python -m tests.service.older_daemon``: ``shardd`` as it was before plans were passed on. It has no ``ExportPlan``,
and takes one request to a ``Load``.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc

from protos.tensor_parallel.v1 import shard_pb2, shard_pb2_grpc
from shardd.main import main

register = shard_pb2_grpc.add_ShardServicer_to_server


class Registered:
    """A server that only writes down what it is to serve."""

    def add_generic_rpc_handlers(self, handlers: Any) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.service, self.handlers = service, handlers


def register_older(servicer: Any, server: grpc.Server) -> None:
    now = Registered()
    register(servicer, now)
    del now.handlers["ExportPlan"]
    now.handlers["Load"] = grpc.unary_stream_rpc_method_handler(
        lambda request, context: servicer.Load(iter([request]), context),
        request_deserializer=shard_pb2.ShardLoadRequest.FromString,
        response_serializer=shard_pb2.ShardLoadProgress.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(now.service, now.handlers),))


if __name__ == "__main__":
    shard_pb2_grpc.add_ShardServicer_to_server = register_older
    sys.exit(main())
