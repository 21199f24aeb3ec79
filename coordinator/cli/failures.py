"""How a verb fails: one line that says what happened and what to do next, and an exit code that scripts can use."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from coordinator.client import RequestError

OK, FAILED, USAGE, NOT_SERVING = 0, 1, 2, 3

EXIT_CODES = """\b
Exit codes:
  0  done
  1  the request failed (the message says why)
  2  wrong usage, or the command cannot start as told
  3  not serving: nobody answers, or the cluster is not ready"""

_NEXT = {
    "NOT_FOUND": "`shardctl models` lists what is loaded",
    "UNAUTHENTICATED": "give the token with --token-file, or a client certificate with --tls-cert and --tls-key",
    "PERMISSION_DENIED": "models are read below the daemons' --model-root only",
    "FAILED_PRECONDITION": "`shardctl health` shows the state of models and ranks",
    "RESOURCE_EXHAUSTED": "send less at a time, or try again later",
    "DEADLINE_EXCEEDED": "a larger --timeout gives it more time; `shardctl health` shows whether the ranks work",
    "UNAVAILABLE": "`shardctl health` shows which rank; the cluster recovers by itself, so try again",
    "INTERNAL": "this is a bug; the logs have the details under the request id",
    "UNIMPLEMENTED": "client and server are of different versions",
}


class Failure(Exception):
    """A verb's own failure, with its exit code."""

    def __init__(self, message: str, code: int = FAILED, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


def explain(error: RequestError, target: str) -> Failure:
    """A failed call in the words of somebody at a shell."""
    name, details = error.code().name, error.details()
    code = NOT_SERVING if name == "UNAVAILABLE" else FAILED
    if name == "UNAVAILABLE" and ("failed to connect" in details or "Socket closed" in details or "DNS" in details):
        hint = "start a cluster with `shardctl up --ranks 2`, or say where one is with --target HOST:PORT"
        return Failure(f"nobody answers at {target}", code, hint)
    suffix = f" (request {error.request_id})" if error.request_id else ""
    return Failure(f"{name}: {details}{suffix}", code, _NEXT.get(name, ""))


def leave(failure: Failure, *, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": str(failure), "hint": failure.hint, "exit_code": failure.code}))
    else:
        print(f"shardctl: {failure}" + (f"\n  {failure.hint}" if failure.hint else ""), file=sys.stderr)
    sys.exit(failure.code)
