"""``shardctl node``: the daemons of one machine of a larger cluster, as a pod or a service runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.settings import option, settings_of, shared
from coordinator.cli.up import make_node, node_options

if TYPE_CHECKING:
    from coordinator.cli.running import Running


def _as_json(command: Any) -> Any:
    return shared(command, only=("--json",))


@_as_json
@click.command(short_help="Start and supervise this machine's daemons, for a coordinator elsewhere.")
@node_options
@option("--listen", required=True, metavar="HOST:PORT", help="Rank i of this node listens on PORT+i.")
@option("--rank-offset", type=click.IntRange(min=0), default=0, show_default=True, help="The first daemon's rank.")
@option("--world-size", type=click.IntRange(min=0), default=0, help="Ranks on all nodes.  [default: those here]")
@option("--advertise", default="", metavar="HOST", help="Address at which other nodes reach this one.")
@option("--interface", default="", metavar="IFACE", help="Network interface for the traffic between ranks.")
@click.pass_context
def node(context: click.Context, /, **options: Any) -> None:
    """Starts one daemon per rank, each pinned to its own GPU, and keeps them running until SIGTERM.

    The coordinator runs elsewhere and is given their addresses. TLS, tokens and metrics of the daemons are set by
    SHARDD_* variables, which they inherit.
    """
    import asyncio

    from coordinator.cli.running import run

    host, _, port = options["listen"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65536 - options["ranks"]:
        raise click.BadParameter(f"--listen {options['listen']!r} is not HOST:PORT with room for every rank's port")
    settings = settings_of(context)
    asyncio.run(run(make_node(options), None, (), settings, lambda running: _tell(running, bool(settings.json))))


def _tell(running: Running, as_json: bool) -> None:
    import json

    found = running.describe()
    if as_json:
        print(json.dumps({key: found[key] for key in ("ready", "pid", "ranks")}), flush=True)
    else:
        print(f"UP ranks={','.join(str(rank['rank']) for rank in found['ranks'])}", flush=True)
