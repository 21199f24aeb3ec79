"""Printing: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    # Into a pipe, whole lines: rich would fold them at 80 columns.
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, soft_wrap=not stream.isatty(), highlight=False, width=None if stream.isatty() else 200
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Columns whose name starts with ">" are aligned right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def size(count: float) -> str:
    """Bytes as people read them: ``1.5 GiB``."""
    unit = 0
    while abs(count) >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def yes(value: bool) -> str:
    return "yes" if value else "[red]no[/red]"
