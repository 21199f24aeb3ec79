"""``shardctl node``: the daemons of one machine of a larger cluster, as a pod or a service runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.settings import Settings, option, settings_of, shared
from coordinator.cli.up import make_node, node_options

if TYPE_CHECKING:
    from coordinator.cli.running import Running
    from coordinator.supervisor.cluster import Node


def _as_json(command: Any) -> Any:
    return shared(command, only=("--json",))


@_as_json
@click.command(short_help="Start and supervise this machine's daemons, for a coordinator elsewhere.")
@node_options
@option("--listen", required=True, metavar="HOST:PORT", help="Rank i of this node listens on PORT+i.")
@option("--rank-offset", type=click.IntRange(min=0), default=0, show_default=True, help="The first daemon's rank.")
@option("--world-size", type=click.IntRange(min=0), default=0, help="Ranks on all nodes.  [default: those here]")
@option("--nodes", type=click.IntRange(min=1), help="Of so many nodes with as many ranks each ...")
@option("--node-index", type=click.IntRange(min=0), help="... this is the one with this index, from 0.")
@option("--advertise", default="", metavar="HOST", help="Address at which other nodes reach this one.")
@option("--interface", default="", metavar="IFACE", help="Network interface for the traffic between ranks.")
@option("--health-listen", metavar="HOST:PORT", help="Serve grpc.health.v1 for all daemons here, in plain text.")
@option("--metrics-listen", default="", metavar="HOST:PORT", help="Rank i of this node serves metrics on PORT+i.")
@click.pass_context
def node(context: click.Context, /, **options: Any) -> None:
    """Starts one daemon per rank, each pinned to its own GPU, and keeps them running until SIGTERM.

    The coordinator runs elsewhere and is given their addresses. Ranks follow from --nodes and --node-index (a pod's
    place in its set), or from --rank-offset and --world-size. TLS and tokens of the daemons are set by SHARDD_*
    variables, which they inherit.

    On --health-listen, "liveness" is SERVING once every daemon is up, "readiness" while all are in their group.
    """
    import asyncio

    for flag in ("listen", "metrics_listen"):
        _check_ports(flag, options[flag], options["ranks"])
    _place(options)
    health = options.pop("health_listen")
    asyncio.run(_run(make_node(options), health, settings_of(context)))


def _check_ports(flag: str, address: str, ranks: int) -> None:
    host, _, port = address.rpartition(":")
    if address and (not host or not port.isdecimal() or not 0 < int(port) <= 65536 - ranks):
        shown = "--" + flag.replace("_", "-")
        raise click.BadParameter(f"{shown} {address!r} is not HOST:PORT with room for every rank's port")


def _place(options: dict[str, Any]) -> None:
    """Turns a node's index into its first rank and the number of ranks."""
    nodes, index = options.pop("nodes"), options.pop("node_index")
    if (nodes is None) != (index is None):
        raise click.UsageError("--nodes and --node-index go together")
    if nodes is None:
        return
    if options["rank_offset"] or options["world_size"]:
        raise click.UsageError("give either --nodes and --node-index, or --rank-offset and --world-size")
    if index >= nodes:
        raise click.UsageError(f"--node-index {index} must be less than --nodes {nodes}")
    options["rank_offset"], options["world_size"] = index * options["ranks"], nodes * options["ranks"]


async def _run(node: Node, health_listen: str | None, settings: Settings) -> None:
    from coordinator.cli.failures import USAGE, Failure
    from coordinator.cli.running import run
    from coordinator.supervisor.node_health import NodeHealth

    health = NodeHealth(health_listen) if health_listen else None

    def told(running: Running) -> None:
        if health is not None:
            health.attach(running.supervisor)
        _tell(running, bool(settings.json))

    if health is not None:
        try:
            await health.start()
        except OSError as error:
            raise Failure(f"--health-listen: {error}", USAGE) from None
    try:
        await run(node, None, (), settings, told)
    finally:
        if health is not None:
            await health.stop()


def _tell(running: Running, as_json: bool) -> None:
    import json

    found = running.describe()
    if as_json:
        print(json.dumps({key: found[key] for key in ("ready", "pid", "ranks")}), flush=True)
    else:
        print(f"UP ranks={','.join(str(rank['rank']) for rank in found['ranks'])}", flush=True)
