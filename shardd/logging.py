"""Logs: one JSON object a line on stderr, or a human format on a terminal.

Every line has ``ts`` (ISO 8601, UTC), ``level``, ``event`` (a stable snake_case name), ``logger`` and ``rank``;
``generation``, ``model`` and ``request_id`` follow wherever they are known. Messages of libraries arrive in the same
form as event ``library``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

_FIRST = ("ts", "level", "event", "logger", "rank", "generation", "model", "request_id")

Logger = FilteringBoundLogger


def configure(level: str, format: str, *, rank: int, stream: TextIO | None = None) -> Logger:
    """Sets up this process's logs, once, and returns the daemon's logger. ``format``: auto, json or console."""
    out = sys.stderr if stream is None else stream
    console = format == "console" or (format == "auto" and out.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    line = _Line(out)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.MaybeTimeStamper(fmt="iso", utc=True, key="ts"),  # a report has its own
            _ordered,
            *(_console(out.isatty()) if console else _json()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_args: line,
        cache_logger_on_first_use=True,
    )
    logger = cast(Logger, structlog.get_logger().bind(logger="shardd", rank=rank))
    root = logging.getLogger()
    root.handlers[:] = [_Library(logger)]
    root.setLevel(max(threshold, logging.WARNING))
    logging.captureWarnings(True)
    return logger


def _ordered(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """The keys that people look for first, first."""
    return {key: event[key] for key in _FIRST if key in event} | dict(event)


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]


def _console(colors: bool) -> list[Processor]:
    # Plain tracebacks: the rich ones print local variables, and with them tensors and tokens.
    plain = structlog.dev.plain_traceback
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, timestamp_key="ts", sort_keys=False, exception_formatter=plain
    )
    return [renderer]


class _Line:
    """Writes whole lines. A reader that has gone away must not stop the daemon."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, message: str) -> None:
        try:
            self._stream.write(message + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = warn = error = critical = fatal = failure = err = log = exception = msg


class _Library(logging.Handler):
    """Passes records of the standard library's loggers (grpc, torch, warnings) on as event ``library``."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        fields: dict[str, Any] = {"exc_info": exc_info} if exc_info else {}
        self._logger.log(record.levelno, "library", source=record.name, message=record.getMessage(), **fields)
