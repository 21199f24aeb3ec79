"""How a model is to be loaded and run, as a caller says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tensor_parallel.errors import InvalidInput

EXECUTIONS = ("eager", "compile")


@dataclass(frozen=True)
class ServingOptions:
    """``verify``: compare a sharded replica with the unsharded model when planning; where there is no graph to compare,
    see that the model runs at all. ``known_plan``: digest of a plan for which that was done. ``plan``: what
    ``ServedModel.export_plan`` gave on a rank that has the plan with that digest; where it can be used nothing is
    planned again. ``threads``: the reader's.
    ``execution``: ``eager``, or ``compile`` to run what ``torch.compile`` makes of each rank's part of the graph;
    ``verify`` then also compares that with the same part uncompiled, whatever plan is known.
    """

    verify: bool = True
    known_plan: str = ""
    plan: bytes = field(default=b"", repr=False)
    threads: int | None = None
    execution: str = "eager"

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> ServingOptions:
        """From a plain mapping. Raises :class:`InvalidInput` naming what is unknown or malformed."""
        if unknown := sorted(map(str, set(options) - {known.name for known in fields(cls)})):
            raise InvalidInput(f"unknown serving option {', '.join(unknown)}")
        verify, threads = options.get("verify", True), options.get("threads")
        if not isinstance(verify, bool):
            raise InvalidInput("option verify must be true or false")
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 64):
            raise InvalidInput("option threads must be from 1 to 64")
        if (execution := options.get("execution") or "eager") not in EXECUTIONS:
            raise InvalidInput(f"option execution is {execution!r}, but must be one of {', '.join(EXECUTIONS)}")
        if not isinstance(plan := options.get("plan", b""), bytes):
            raise InvalidInput("option plan must be bytes")
        return cls(verify, str(options.get("known_plan", "")), plan, threads, execution)
