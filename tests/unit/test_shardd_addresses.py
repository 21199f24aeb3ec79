"""Where shardd listens: parsing, and telling that an address is taken before gRPC hides it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from shardd.addresses import (
    Address,
    BindError,
    check_free,
    interface_address,
    listening_socket,
    parse_address,
    reachable_host,
    write_port_file,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("[::1]:0", Address("::1", 0)),
        ("unix:/run/shardd/0.sock", Address(path="/run/shardd/0.sock")),
        ("unix:///run/shardd/0.sock", Address(path="/run/shardd/0.sock")),
    ],
)
def test_parse(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("text", ["", ":", "host", "host:", ":80", "host:-1", "host:65536", "a b:1", "http://h:1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_address(text)


def test_a_taken_port() -> None:
    with listening_socket("127.0.0.1") as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(BindError, match=f"{address}.*in use"):
            check_free(address)
    check_free(address)


def test_a_taken_unix_socket_is_not_stolen(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(BindError, match="in use"):
            check_free(Address(path=str(path)))
    check_free(Address(path=str(path)))  # left behind by a server that is gone


def test_unix_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BindError, match="no socket"):
        check_free(Address(path=str(tmp_path / "file")))
    with pytest.raises(BindError, match="not a directory"):
        check_free(Address(path=str(tmp_path / "nowhere" / "s")))


def test_unknown_hosts_and_interfaces() -> None:
    with pytest.raises(BindError, match=r"192\.0\.2\.1"):
        check_free(Address("192.0.2.1", 0))
    with pytest.raises(BindError, match="nosuch0"):
        interface_address("nosuch0")
    with pytest.raises(BindError, match=r"192\.0\.2\.1"):
        listening_socket("192.0.2.1")


def test_the_address_for_peers() -> None:
    local = Address("127.0.0.1", 1)
    assert reachable_host(local, "rank0.example", "") == "rank0.example"
    assert reachable_host(local, "", "lo") == "127.0.0.1"
    assert reachable_host(local, "", "") == "127.0.0.1"
    assert reachable_host(Address(path="/s"), "", "") == "127.0.0.1"
    assert reachable_host(Address("0.0.0.0", 1), "", "") != "0.0.0.0"


def test_port_files_are_whole(tmp_path: Path) -> None:
    write_port_file(tmp_path / "port", "127.0.0.1:5")
    assert (tmp_path / "port").read_text() == "127.0.0.1:5\n"
    assert [path.name for path in tmp_path.iterdir()] == ["port"]
