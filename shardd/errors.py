"""Every way in which the daemon says no, and the one table that maps errors to gRPC codes.

``ShardError``s are the daemon's own and carry their code. Whatever the library, torch or a model raises is looked up in
``_TABLE`` by the names of its classes, so that the table is complete without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from tensor_parallel.errors import device_failed, out_of_memory

Code = grpc.StatusCode

EXIT_STUCK = 70
"""An aborted forward did not let go, or the device is beyond repair; a fresh process is needed."""


class StartError(Exception):
    """The daemon cannot start as told; the message is one line for the operator."""


class ShardError(Exception):
    """Base of the daemon's own refusals."""

    code = Code.INTERNAL


class InvalidRequest(ShardError):
    """A message that makes no sense whatever the daemon's state."""

    code = Code.INVALID_ARGUMENT


class UnknownModel(ShardError):
    """No such model or version here."""

    code = Code.NOT_FOUND


class WrongState(ShardError):
    """The message makes sense, but not in the daemon's present state."""

    code = Code.FAILED_PRECONDITION


class Superseded(ShardError):
    """Another coordinator owns this daemon; the message names it and its generation."""

    code = Code.ABORTED


class Draining(ShardError):
    """The daemon is shutting down."""

    code = Code.UNAVAILABLE


class Starting(ShardError):
    """The daemon is still starting."""

    code = Code.UNAVAILABLE


class LoadCancelled(ShardError):
    """The load's caller has left or has cancelled it."""

    code = Code.CANCELLED


class ModelError(ShardError):
    """A model raised while it ran: its own verdict on the request."""

    code = Code.INVALID_ARGUMENT


@dataclass(frozen=True)
class Verdict:
    """What an error means to whoever asked.

    ``kind`` lets the coordinator compare ranks. ``collective``: the error arose between ranks, so it ends the
    generation. ``ours``: a bug of this program, whose detail belongs in the log and not in the answer.
    """

    code: grpc.StatusCode
    kind: str
    message: str
    collective: bool = False
    ours: bool = False


# By class name, the most derived class first.
_TABLE = {
    "InvalidInput": Code.INVALID_ARGUMENT,
    "ShapeError": Code.INVALID_ARGUMENT,
    "CheckpointError": Code.INVALID_ARGUMENT,
    "AccessDenied": Code.PERMISSION_DENIED,
    "LoadCancelled": Code.CANCELLED,
    "PlanError": Code.FAILED_PRECONDITION,
    "NotPortable": Code.FAILED_PRECONDITION,
    "CannotCompile": Code.FAILED_PRECONDITION,
    "DoesNotFit": Code.FAILED_PRECONDITION,
    "ConfigError": Code.FAILED_PRECONDITION,
    "CollectiveError": Code.UNAVAILABLE,
    "GroupUnbound": Code.UNAVAILABLE,
    "DistError": Code.UNAVAILABLE,
    "OutOfMemoryError": Code.RESOURCE_EXHAUSTED,
    "MemoryError": Code.RESOURCE_EXHAUSTED,
    "PermissionError": Code.PERMISSION_DENIED,
}
_BETWEEN_RANKS = ("CollectiveError", "GroupUnbound")
_LONGEST = 2000


def judge(error: BaseException) -> Verdict:
    """The verdict on any error."""
    message = describe(error)
    if isinstance(error, ShardError):
        cause = error.__cause__ if isinstance(error, ModelError) and error.__cause__ is not None else error
        return Verdict(error.code, type(cause).__name__, message)
    names = [kind.__name__ for kind in type(error).__mro__]
    if out_of_memory(error):
        return Verdict(Code.RESOURCE_EXHAUSTED, "OutOfMemory", f"out of memory: {message}")
    if device_failed(error):
        return Verdict(Code.UNAVAILABLE, "DeviceError", f"the device failed: {message}", collective=True)
    for name in names:
        if name in _TABLE:
            return Verdict(_TABLE[name], type(error).__name__, message, collective=name in _BETWEEN_RANKS)
    return Verdict(Code.INTERNAL, type(error).__name__, message, ours=True)


def known(error: BaseException) -> bool:
    """Whether ``error`` says by itself what it is; anything else raised by a model is a :class:`ModelError`."""
    return not judge(error).ours


def describe(error: BaseException) -> str:
    """One short line for people, without C++ backtraces."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
