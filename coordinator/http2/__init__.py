"""gRPC over HTTP/2 on the event loop itself: what the coordinator's plaintext ports are served by.

``grpc.aio`` polls its sockets in a thread of its own and hands every event over to the loop; with the model's ranks on
the same cores that costs a third of a millisecond for each request.  Here the loop reads the sockets.  The protocol is
hyper's (Rust, through ``httpunk``): frames, HPACK, flow control, and the defences against floods.  This package
is what gRPC adds: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.  It serves the same handlers as a
``grpc.aio.Server`` (``grpc.RpcMethodHandler``, interceptors, ``ServicerContext``), so a servicer does not know which of
the two it runs in.
"""
