"""``shardctl top``: the cluster's health, live."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.health import render
from coordinator.cli.settings import option, settings_of, shared
from coordinator.cli.show import console, print_json

if TYPE_CHECKING:
    from coordinator.client import Client

_COUNTERS = ("coordinator_requests_total", "coordinator_received_bytes_total", "coordinator_sent_bytes_total")


@shared
@click.command(short_help="The cluster, live: ranks, generation, queue, memory, rates.")
@option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between looks.")
@option("--metrics", default="", metavar="HOST:PORT", help="The coordinator's --metrics-listen, for rates.")
@option("--once", is_flag=True, help="Look once and exit.")
@click.pass_context
def top(context: click.Context, /, interval: float, metrics: str, once: bool) -> None:
    """Shows the cluster until Ctrl-C. A coordinator that does not answer is shown as such, and asked again."""
    settings = settings_of(context)
    with settings.client() as client:
        if once or settings.json:
            found = client.health()
            if settings.json:
                print_json(found)
            else:
                console().print(view(found, None))
            return
        with contextlib.suppress(KeyboardInterrupt):
            watch(client, interval, metrics)


def watch(client: Client, interval: float, metrics: str) -> None:
    """Looks for ever; Ctrl-C ends it."""
    from rich.live import Live

    from coordinator.client import RequestError

    out, before, then = console(), None, 0.0
    with Live(console=out, screen=out.is_terminal, auto_refresh=False) as live:
        while True:
            now, counters = time.monotonic(), scrape(metrics)
            try:
                live.update(view(client.health(timeout=2), rates(before, counters, now - then)), refresh=True)
            except RequestError as error:
                live.update(f"[red]{client.target} does not answer[/red]: {error.details()}", refresh=True)
            before, then = counters, now
            if not out.is_terminal:
                out.print(live.renderable)  # rich shows nothing but the last state in a pipe
            time.sleep(interval)


def view(found: dict[str, Any], rate: dict[str, float] | None) -> Any:
    from rich.console import Group

    coordinator = found["coordinator"] or {}
    line = f"queue {coordinator.get('queue_depth', 0)}   in flight {coordinator.get('in_flight', 0)}"
    line += f"   up {coordinator.get('uptime_seconds', 0):.0f} s"
    if rate:
        sent, received = rate["coordinator_sent_bytes_total"], rate["coordinator_received_bytes_total"]
        line += f"   {rate['coordinator_requests_total']:.0f} requests/s"
        line += f"   {received / 2**20:.1f} MiB/s in, {sent / 2**20:.1f} MiB/s out"
    first, *rest = render(found)
    return Group(first, line, *rest)


def scrape(address: str) -> dict[str, float] | None:
    """The coordinator's counters, each summed over its labels; None if they cannot be had."""
    if not address:
        return None
    try:
        with urllib.request.urlopen(
            f"http://{address.removeprefix('http://').partition('/')[0]}/metrics", timeout=2
        ) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    totals = dict.fromkeys(_COUNTERS, 0.0)
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in totals:
            totals[name] += float(line.rpartition(" ")[2])
    return totals


def rates(before: dict[str, float] | None, after: dict[str, float] | None, seconds: float) -> dict[str, float] | None:
    if before is None or after is None or seconds <= 0:
        return None
    # A restarted coordinator counts from zero again.
    return {name: max(0.0, after[name] - before[name]) / seconds for name in after}
