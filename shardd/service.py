"""The ``Shard`` service: converts messages, delegates, and turns errors into status codes. Decides nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc

from protos.tensor_parallel.v1 import coordinator_pb2, shard_pb2, shard_pb2_grpc
from shardd import plans
from shardd.errors import Draining, InvalidRequest, Starting, judge
from shardd.loading import Loader, LoadFailed
from shardd.logging import Logger
from shardd.status import Board

if TYPE_CHECKING:
    from shardd.membership import Membership

START_SECONDS = 60.0
"""How long a call that needs torch waits for a daemon that is still starting, its deadline allowing."""

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Core:
    """What needs torch, and is there a second after the service."""

    membership: Membership
    loader: Loader
    plan: Callable[[coordinator_pb2.PlanRequest], coordinator_pb2.PlanResponse]


def _answers(method: Method) -> Method:
    """Errors of a call with one answer become its status."""

    @functools.wraps(method)
    def call(self: ShardService, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except Exception as error:
            self._abort(method.__name__, error, context)

    return call  # type: ignore[return-value]


def _streams(method: Method) -> Method:
    """Errors of a call with many answers become its status."""

    @functools.wraps(method)
    def call(self: ShardService, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(self, request, context)
        except Exception as error:
            self._abort(method.__name__, error, context)

    return call  # type: ignore[return-value]


class ShardService(shard_pb2_grpc.ShardServicer):
    """``core`` is set once torch has been imported; until then only ``Status`` answers at once."""

    def __init__(self, board: Board, core: Future[Core], log: Logger) -> None:
        self._board = board
        self._core = core
        self._log = log

    @_answers
    def Status(self, request: shard_pb2.StatusRequest, context: grpc.ServicerContext) -> shard_pb2.StatusResponse:
        self._renew(request.lease)
        return self._board.status()

    @_streams
    def Load(
        self, requests: Iterator[shard_pb2.ShardLoadRequest], context: grpc.ServicerContext
    ) -> Iterator[shard_pb2.ShardLoadProgress]:
        core = self._ready(context)
        request = plans.joined(requests)
        if request.HasField("lease"):
            self._board.generations.check_owner(request.lease.owner)
            self._renew(request.lease)
        yield from core.loader.load(request, context.add_callback)

    @_answers
    def CancelLoad(
        self, request: shard_pb2.CancelLoadRequest, context: grpc.ServicerContext
    ) -> shard_pb2.CancelLoadResponse:
        self._ready(context).loader.cancel(request.name, request.version)
        return shard_pb2.CancelLoadResponse()

    @_streams
    def ExportPlan(
        self, request: shard_pb2.ExportPlanRequest, context: grpc.ServicerContext
    ) -> Iterator[shard_pb2.ExportPlanPart]:
        self._ready(context)
        model = self._board.models.loaded(request.name, request.version)
        yield from plans.parts(model.served.export_plan())

    @_answers
    def Fence(self, request: shard_pb2.FenceRequest, context: grpc.ServicerContext) -> shard_pb2.FenceResponse:
        return self._ready(context).membership.fence(request)

    @_answers
    def Join(self, request: shard_pb2.JoinRequest, context: grpc.ServicerContext) -> shard_pb2.JoinResponse:
        return self._ready(context).membership.join(request)

    @_streams
    def Execute(
        self, requests: Iterator[shard_pb2.ChannelRequest], context: grpc.ServicerContext
    ) -> Iterator[shard_pb2.ChannelResponse]:
        core = self._ready(context)
        first = next(requests, None)
        if first is None or not first.HasField("open"):
            raise InvalidRequest("the first message of a channel is open")
        channel = core.membership.open_stream(first.generation, first.open.owner)
        if not context.add_callback(channel.hang_up):
            channel.hang_up()
        context.send_initial_metadata(())  # tells the caller that the channel is open
        threading.Thread(target=channel.feed, args=(requests,), name="channel-reader", daemon=True).start()
        yield from channel.answers()

    @_answers
    def OpenLocalChannel(
        self, request: shard_pb2.OpenLocalChannelRequest, context: grpc.ServicerContext
    ) -> shard_pb2.OpenLocalChannelResponse:
        return self._ready(context).membership.open_local(request.generation, request.owner)

    @_answers
    def Plan(self, request: coordinator_pb2.PlanRequest, context: grpc.ServicerContext) -> coordinator_pb2.PlanResponse:
        return self._ready(context).plan(request)

    def _ready(self, context: grpc.ServicerContext) -> Core:
        """The core, once there is one. Raises :class:`Draining` or :class:`Starting`."""
        if self._board.draining:
            raise Draining(f"rank {self._board.identity.rank} is shutting down")
        left = context.time_remaining()
        try:
            return self._core.result(START_SECONDS if left is None else min(left, START_SECONDS))
        except FutureTimeout:
            raise Starting(f"rank {self._board.identity.rank} is still starting") from None

    def _renew(self, lease: shard_pb2.Lease) -> None:
        self._board.generations.renew(lease.owner, lease.duration_milliseconds / 1000)

    def _abort(self, method: str, error: Exception, context: grpc.ServicerContext) -> NoReturn:
        verdict = error.verdict if isinstance(error, LoadFailed) else judge(error)
        message = verdict.message
        if verdict.ours:
            if not isinstance(error, LoadFailed):
                self._log.error("internal_error", method=method, exc_info=error)
            message = f"internal error on rank {self._board.identity.rank}; see its log"
        context.abort(verdict.code, message)
        raise AssertionError("abort raises")
