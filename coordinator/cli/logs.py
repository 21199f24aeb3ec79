"""``shardctl logs``: the JSON logs of several processes as one readable stream."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import click

from coordinator.cli.settings import option, settings_of, shared

_LEVELS = ("debug", "info", "warning", "error", "critical")
_COLOURS = {"debug": "bright_black", "warning": "yellow", "error": "red", "critical": "red"}
_HEAD = ("ts", "level", "event", "logger", "rank")
Entry = dict[str, Any]


@click.command(short_help="Merge, filter and pretty-print the logs of all processes.")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=True, allow_dash=True, path_type=Path))
@option("--request-id", default="", metavar="ID", help="Only this request (a beginning of the id will do).")
@option("--rank", type=int, default=None, help="Only this rank.")
@option("--model", default="", help="Only this model (any version, unless NAME@VERSION).")
@option("--event", default="", help="Only this event.")
@option("--level", type=click.Choice(_LEVELS), default="debug", help="This level and above.  [default: all]")
@option("--follow", "-f", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.pass_context
def logs(context: click.Context, /, files: tuple[Path, ...], follow: bool, **filters: Any) -> None:
    """Reads log FILES (or directories of *.log files, or standard input) and prints them as one, ordered by time.

    `shardctl up --log-dir DIR` writes such files. Lines that are no JSON are kept as they are, in their place.
    """
    wanted = matcher(**filters)
    show = json.dumps if settings_of(context).json else pretty
    paths = [path for given in files for path in (sorted(given.glob("*.log")) if given.is_dir() else [given])]
    if files and not paths:
        raise click.UsageError(f"no *.log file in {files[0]}")
    piped = not paths or str(paths[0]) == "-"
    entries = parse(sys.stdin) if piped else merged(paths)
    for entry in entries:
        if wanted(entry):
            click.echo(show(entry))
    if follow and not piped:
        with contextlib.suppress(KeyboardInterrupt):
            for entry in followed(paths):
                if wanted(entry):
                    click.echo(show(entry))


logs = shared(logs, only=("--json",))


def parse(lines: Iterable[str]) -> Iterator[Entry]:
    """One entry a line; what is no JSON object becomes {"text": line} with the time of the line before it."""
    last = ""
    for line in lines:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError
            last = str(entry.get("ts", last))
        except ValueError:
            if not line.strip():
                continue
            entry = {"ts": last, "text": line.rstrip("\n")}
        yield entry


def merged(paths: Iterable[Path]) -> Iterator[Entry]:
    """Ordered by time; each file is in order itself, so nothing is held in memory but a line of each."""
    return heapq.merge(*(_read(path) for path in paths), key=lambda entry: str(entry.get("ts", "")))


def _read(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from parse(file)


def followed(paths: Iterable[Path], pause: float = 0.2) -> Iterator[Entry]:
    """What is appended from now on, for ever."""
    files: list[IO[str]] = [path.open(encoding="utf-8", errors="replace") for path in paths]
    for file in files:
        file.seek(0, os.SEEK_END)
    partial = [""] * len(files)
    while True:
        lines = []
        for number, file in enumerate(files):
            *whole, partial[number] = (partial[number] + file.read()).split("\n")
            lines += whole
        yield from sorted(parse(lines), key=lambda entry: str(entry.get("ts", "")))
        if not lines:
            time.sleep(pause)


def matcher(
    request_id: str = "", rank: int | None = None, model: str = "", event: str = "", level: str = "debug"
) -> Callable[[Entry], bool]:
    least = _LEVELS.index(level)

    def wanted(entry: Entry) -> bool:
        ids = [entry.get("request_id", ""), *(entry.get("request_ids") or ())]
        return (
            (not request_id or any(str(each).startswith(request_id) for each in ids))
            and (rank is None or entry.get("rank") == rank)
            and (not model or str(entry.get("model", "")) in (model, f"{model}@{entry.get('version', '')}")
                 or str(entry.get("model", "")).split("@")[0] == model)
            and (not event or entry.get("event") == event)
            and (least == 0 or (entry.get("level") in _LEVELS and _LEVELS.index(entry["level"]) >= least))
        )  # fmt: skip

    return wanted


def pretty(entry: Entry) -> str:
    """``12:34:56.789 warning rank 1   rank_lost  reason="..."``"""
    if "text" in entry:
        return "             | " + str(entry["text"])
    level = str(entry.get("level", ""))
    clock = str(entry.get("ts", "")).partition("T")[2][:12]
    who = (
        f"rank {entry['rank']}" if entry.get("logger") == "shardd" and "rank" in entry else str(entry.get("logger", ""))
    )
    rest = [f"{key}={_value(value)}" for key, value in entry.items() if key not in _HEAD and key != "exception"]
    if entry.get("logger") != "shardd" and entry.get("rank") is not None:
        rest.insert(0, f"rank={entry['rank']}")
    line = f"{clock:<12} {click.style(f'{level:<8}', fg=_COLOURS.get(level))}{who:<12} "
    line += click.style(f"{entry.get('event', '')!s:<20}", bold=True) + " " + " ".join(rest)
    trace = str(entry.get("exception", "")).rstrip()
    return line.rstrip() + ("\n" + "\n".join("             | " + each for each in trace.splitlines()) if trace else "")


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if isinstance(value, str) and (" " in text or not text) else text
