"""Logs: one JSON object a line on stderr, or a human format on a terminal.

Every line has ``ts`` (ISO 8601, UTC), ``level``, ``event`` (a stable snake_case name) and ``logger``; ``request_id``,
``model``, ``rank`` and ``generation`` follow wherever they are known.  What ``bound`` binds reaches every line of the
task (and of the tasks it starts), so that one request can be followed by its id.  Messages of libraries arrive in the
same form as event ``library``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, TextIO, cast

import structlog
from structlog.contextvars import bound_contextvars
from structlog.typing import FilteringBoundLogger

LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("auto", "json", "console")
_FIRST = ("ts", "level", "event", "logger", "rank", "generation", "model", "request_id")
_SECRET = ("authorization", "token", "password", "secret")


def configure(
    level: str = "info", format: str = "auto", *, component: str = "coordinator", stream: TextIO | None = None
) -> None:
    """Sets up this process's logs; called once, by main.

    ``format`` "auto" is "console" if ``stream`` (default: stderr) is a terminal, else "json".
    Raises ValueError for an unknown level or format.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is none of {', '.join(LEVELS)}")
    if format not in FORMATS:
        raise ValueError(f"log format {format!r} is none of {', '.join(FORMATS)}")
    out = sys.stderr if stream is None else stream
    console = format == "console" or (format == "auto" and out.isatty())
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.StackInfoRenderer(),
            _Finish(component),
            *(_console(out.isatty()) if console else _json()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=_factory(_Line(out)),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Library()]
    root.setLevel(max(threshold, logging.WARNING))


def get_logger(**fields: Any) -> FilteringBoundLogger:
    """A logger whose lines carry ``fields``: ``log.info("load_finished", model=name, seconds=1.2)``."""
    return cast(FilteringBoundLogger, structlog.get_logger(**fields))


def bound(**fields: Any) -> AbstractContextManager[None]:
    """Adds ``fields`` (those that are not None or empty) to every line logged inside, tasks started there included."""
    return bound_contextvars(**{key: value for key, value in fields.items() if value not in (None, "")})


class _Finish:
    """Names the component, hides secrets, and puts the keys that people look for first."""

    def __init__(self, component: str) -> None:
        self._component = component

    def __call__(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        event.setdefault("logger", self._component)
        ordered = {key: event[key] for key in _FIRST if key in event}
        for key, value in event.items():
            if key not in ordered:
                ordered[key] = "(hidden)" if key.lower() in _SECRET else value
        return ordered


def _json() -> list[Any]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]


def _console(colors: bool) -> list[Any]:
    # Plain tracebacks: the rich ones print local variables, and with them tensors and tokens.
    plain = structlog.dev.plain_traceback
    return [
        structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="ts", sort_keys=False, exception_formatter=plain)
    ]


class _Line:
    """Writes whole lines. A reader that has gone away must not stop the service."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, message: str) -> None:
        try:
            self._stream.write(message + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = warn = error = critical = fatal = failure = err = log = exception = msg


def _factory(line: _Line) -> Callable[..., _Line]:
    return lambda *_args: line


class _Library(logging.Handler):
    """Passes records of the standard library's loggers (grpc, asyncio) on as event ``library``."""

    def emit(self, record: logging.LogRecord) -> None:
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        fields: dict[str, Any] = {"exc_info": exc_info} if exc_info else {}
        get_logger().log(record.levelno, "library", source=record.name, message=record.getMessage(), **fields)
