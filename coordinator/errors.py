"""Every failure a client can see, and the one table that maps them to gRPC.

A ``ServiceError`` carries a message meant for the client: it names the thing (input, model, rank) and never holds a
traceback. Anything else that escapes is a bug of ours: INTERNAL, logged with the request id.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from coordinator.logging import get_logger

DOMAIN = "tensor-parallel-service"
RETRY_AFTER = "retry-after-ms"
MAX_MESSAGE = 1000  # characters: a status travels in HTTP/2 headers, of which gRPC accepts 8 KiB


class ServiceError(Exception):
    """``retry_after_ms`` is None when retrying the same request does not help."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
        self.retry_after_ms = retry_after_ms


class InvalidArgument(ServiceError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(ServiceError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ServiceError):
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(ServiceError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(ServiceError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(ServiceError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ServiceError):
    code = grpc.StatusCode.CANCELLED


class Unavailable(ServiceError):
    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(ServiceError):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServiceError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(ServiceError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(ServiceError):
    code = grpc.StatusCode.INTERNAL


_BY_CODE: dict[int, type[ServiceError]] = {
    error.code.value[0]: error
    for error in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        DeadlineExceeded,
        Cancelled,
        Unavailable,
        Unauthenticated,
        PermissionDenied,
        Unimplemented,
        Internal,
    )
}


def from_code(code: int, message: str, *, retry_after_ms: int | None = None) -> ServiceError:
    """The error for a numeric gRPC code; a code outside the table is INTERNAL."""
    return _BY_CODE.get(code, Internal)(message, retry_after_ms=retry_after_ms)


def from_rpc(error: grpc.RpcError, prefix: str = "") -> ServiceError:
    """What a rank's daemon answered with, as our own error; ``prefix`` says which rank."""
    code = error.code().value[0]
    return from_code(code, prefix + (error.details() or error.code().name))


NO_MEMORY = "the coordinator has no memory for this request"


def describe(error: BaseException, request_id: str) -> ServiceError:
    """``error`` as it may be shown to a client; a bug is logged here, with its traceback, and nowhere else."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, MemoryError):
        get_logger().warning("no_memory", request_id=request_id, error=str(error))
        return ResourceExhausted(NO_MEMORY)
    get_logger().error("internal_error", request_id=request_id, exc_info=error)
    return Internal(f"internal error; the coordinator's log has the details of request {request_id}")


def status_of(error: ServiceError, request_id: str) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo and, where a retry can help, RetryInfo."""
    code = error.code.value[0]
    status = status_pb2.Status(code=code, message=error.message)
    info = error_details_pb2.ErrorInfo(reason=code_pb2.Code.Name(code), domain=DOMAIN)
    info.metadata["request_id"] = request_id
    status.details.add().Pack(info)
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, request_id: str) -> NoReturn:
    """Ends the RPC with ``error``: the one place where errors become gRPC statuses."""
    shown = describe(error, request_id)
    metadata = list(rpc_status.to_status(status_of(shown, request_id)).trailing_metadata)
    metadata.append(("x-request-id", request_id))
    if shown.retry_after_ms is not None:
        metadata.append((RETRY_AFTER, str(shown.retry_after_ms)))
    await context.abort(shown.code, shown.message, tuple(metadata))
    raise AssertionError("abort returned")
