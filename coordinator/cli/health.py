"""``shardctl health``."""

from __future__ import annotations

from typing import Any

import click

from coordinator.cli.failures import NOT_SERVING
from coordinator.cli.settings import settings_of, shared
from coordinator.cli.show import console, print_json, size, table, yes


@shared
@click.command(short_help="Whether the cluster serves, and how each model and rank is.")
@click.pass_context
def health(context: click.Context) -> None:
    """Whether the cluster serves, and how each model and rank is. Exit code 3 if it does not.

    The keys of --json are fixed: serving, reason, generation, coordinator {pid, state}, models [{name, version,
    serving}], ranks [{rank, pid, host, device, state, loads, generation, bytes_held, peak_bytes, last_error}]; others
    may be added.
    """
    settings = settings_of(context)
    with settings.client() as client:
        found = client.health()
    if settings.json:
        print_json(found)
    else:
        for each in render(found):
            console().print(each)
    if not found["serving"]:
        context.exit(NOT_SERVING)


def render(found: dict[str, Any]) -> list[Any]:
    """The report as things that rich can print."""
    coordinator = found["coordinator"] or {"pid": "?", "state": "?"}
    state = "[green]serving[/green]" if found["serving"] else f"[red]not serving[/red]: {found['reason']}"
    line = f"{state}   generation {found['generation']}   coordinator {coordinator['state']}, pid {coordinator['pid']}"
    models = table(
        "",
        ("model", "version", "serving", "reason"),
        ((m["name"], m["version"], yes(m["serving"]), m.get("reason", "")) for m in found["models"]),
    )
    ranks = table(
        "",
        (">rank", ">pid", "device", "state", ">generation", ">loads", ">held", ">peak", "last error"),
        (_rank(rank) for rank in found["ranks"]),
    )
    return [line, *([models] if found["models"] else []), ranks]


def _rank(rank: dict[str, Any]) -> tuple[object, ...]:
    state = rank["state"] if rank["state"] == "READY" else f"[red]{rank['state']}[/red]"
    sizes = size(rank["bytes_held"]), size(rank["peak_bytes"])
    counts = rank["generation"], rank["loads"]
    return rank["rank"], rank["pid"], rank["device"], state, *counts, *sizes, rank["last_error"]
