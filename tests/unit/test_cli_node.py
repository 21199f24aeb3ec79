"""`shardctl node`: wrong settings are told before anything starts, and how a node's place in its set is counted."""

from __future__ import annotations

import socket

import click
import pytest
from click.testing import CliRunner

from coordinator.cli.app import shardctl
from coordinator.cli.node import _place

GOOD = ["node", "--ranks", "2", "--device", "cpu", "--allow-factory", "a.b:c"]
LISTEN = ["--listen", "127.0.0.1:7000"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing option '--listen'"),
        (["--listen", "7000"], "--listen '7000' is not HOST:PORT"),
        (["--listen", "127.0.0.1:0"], "with room for every rank's port"),
        (["--listen", "127.0.0.1:65535"], "with room for every rank's port"),
        ([*LISTEN, "--metrics-listen", "127.0.0.1:65536"], "--metrics-listen '127.0.0.1:65536' is not"),
        ([*LISTEN, "--nodes", "2"], "--nodes and --node-index go together"),
        ([*LISTEN, "--nodes", "2", "--node-index", "2"], "--node-index 2 must be less than --nodes 2"),
        ([*LISTEN, "--nodes", "2", "--node-index", "0", "--world-size", "4"], "give either --nodes"),
        ([*LISTEN, "--rank-offset", "3", "--world-size", "4"], "ranks up to 4 do not fit in 4"),
        ([*LISTEN, "--model-root", "/no/such"], "no directory '/no/such'"),
        ([*LISTEN, "--allow-factory", "a.b"], "--allow-factory 'a.b' is not PACKAGE.MODULE:NAME"),
        ([*LISTEN, "--health-listen", "192.0.2.1:1"], "cannot listen on 192.0.2.1:1"),
    ],
    ids=str,
)
def test_wrong_settings(arguments, says):
    result = CliRunner().invoke(shardctl, [*GOOD, *arguments])
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_a_health_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(shardctl, [*GOOD, *LISTEN, "--health-listen", where])
    assert result.exit_code == 2
    assert f"--health-listen: cannot listen on {where}" in result.stderr


@pytest.mark.parametrize(
    ("nodes", "index", "offset", "world"), [(None, None, 0, 0), (1, 0, 0, 4), (3, 0, 0, 12), (3, 2, 8, 12)]
)
def test_a_nodes_place_in_its_set(nodes, index, offset, world):
    options = {"ranks": 4, "nodes": nodes, "node_index": index, "rank_offset": 0, "world_size": 0}
    _place(options)
    assert options == {"ranks": 4, "rank_offset": offset, "world_size": world}


def test_a_place_given_twice_is_refused():
    with pytest.raises(click.UsageError, match="give either"):
        _place({"ranks": 4, "nodes": 2, "node_index": 0, "rank_offset": 4, "world_size": 0})
