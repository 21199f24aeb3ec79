"""One forward as every protocol of ours runs it: traced, logged and counted."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from coordinator.errors import FailedPrecondition, Unavailable, describe
from coordinator.logging import get_logger
from coordinator.rpc import Call
from coordinator.tracing import Tracing
from coordinator.types import InferRequest, InferResult

if TYPE_CHECKING:
    from coordinator.core import Core


async def run(
    core: Core, tracing: Tracing, request: InferRequest, call: Call, method: str, *, unready: bool = False
) -> InferResult:
    """``request`` takes id and trace from ``call``, and its deadline unless its own is sooner. Raises ServiceError.

    ``unready``: a model that is known but not loaded is UNAVAILABLE, as the Open Inference Protocol's clients expect,
    and not FAILED_PRECONDITION.
    """
    request.request_id, request.trace_context = call.request_id, call.trace_context
    if call.deadline is not None:
        request.deadline = call.deadline if request.deadline is None else min(call.deadline, request.deadline)
    started = time.perf_counter()
    code = "CANCELLED"
    try:
        result = await tracing.forward(core, request, method)
        code = "OK"
        result.request_id = call.request_id
        return result
    except Exception as error:
        shown = describe(error, call.request_id)
        if unready and isinstance(shown, FailedPrecondition):
            shown = Unavailable(shown.message)
        code = shown.code.name
        get_logger().warning("forward_failed", model=request.model, request_id=call.request_id, error=shown.message)
        raise shown from None
    finally:
        seconds = time.perf_counter() - started
        core.metrics.request_finished(request.model, code, seconds)
        # The line is written once the answer is on its way.
        asyncio.get_running_loop().call_soon(_log, request.model, call.request_id, round(seconds, 6), code)


def _log(model: str, request_id: str, seconds: float, status: str) -> None:
    get_logger().info("forward", model=model, request_id=request_id, seconds=seconds, status=status)
