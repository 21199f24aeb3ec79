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
        # Told of once the answer is on its way.
        asyncio.get_running_loop().call_soon(_finished, core, request.model, call.request_id, seconds, code)


def _finished(core: Core, model: str, request_id: str, seconds: float, status: str) -> None:
    core.metrics.request_finished(model, status, seconds)
    get_logger().info("forward", model=model, request_id=request_id, seconds=round(seconds, 6), status=status)
