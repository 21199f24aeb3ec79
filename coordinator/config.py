"""Flags and environment, read once into a frozen value. A flag beats its variable, ``COORDINATOR_<FLAG>``."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

PREFIX = "COORDINATOR_"
# Kubernetes tells every pod about a Service called "coordinator" by variables with our prefix.
SERVICE_LINK = re.compile(r"COORDINATOR_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
MAX_MESSAGE = 2**31 - 1  # gRPC's own limit; ForwardStream goes past it


class ConfigError(Exception):
    """One line that says which flag or variable is wrong, and what it takes."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files. ``ca`` of a server: whose client certificates it accepts (mTLS); of a client: whose servers."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def enabled(self) -> bool:
        return self.cert is not None or self.ca is not None


@dataclass(frozen=True, slots=True)
class Config:
    """Durations are seconds, sizes bytes, addresses ``host:port`` or ``unix:/path``; ``shards`` is in rank order."""

    shards: tuple[str, ...]
    listen: str = "127.0.0.1:50051"
    port_file: Path | None = None
    state_dir: Path | None = None
    loads: tuple[tuple[str, str], ...] = ()
    queue_size: int = 256
    overload_factor: float = 2.5
    max_message_bytes: int = MAX_MESSAGE
    heartbeat: float = 0.25
    heartbeat_timeout: float = 1.0
    forward_bound: float = 60.0
    lease: float = 3.0
    join_timeout: float = 15.0
    probe_interval: float = 1.0
    probe_bound: float = 10.0
    load_stall: float = 600.0
    batch_rows: int = 64
    batch_delay: float = 0.001
    pipeline_depth: int = 2
    drain: float = 30.0
    health_listen: str | None = None
    metrics_listen: str | None = None
    tls: TlsConfig = TlsConfig()
    token: str | None = None
    shard_tls: TlsConfig = TlsConfig()
    shard_tls_name: str | None = None
    shard_token: str | None = None
    shared_memory_prefix: str | None = None
    local_channel: bool = True
    log_level: str = "info"
    log_format: str = "auto"

    @property
    def world_size(self) -> int:
        return len(self.shards)

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if f.name not in ("token", "shard_token"))
        return f"Config({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"


@dataclass(frozen=True, slots=True)
class _Option:
    flag: str
    help: str
    parse: Callable[[str], Any] = str
    repeat: bool = False
    default: Any = None

    @property
    def key(self) -> str:
        return self.flag.replace("-", "_")

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ConfigError(f"takes {'an integer' if kind is int else 'a number'}, not {text!r}") from None
        if not low <= value <= high:
            raise ConfigError(f"takes a value from {low:g} to {high:g}, not {text!r}")
        return value

    return parse


def _choice(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ConfigError(f"takes one of {', '.join(values)}, not {text!r}")
        return text

    return parse


def _address(text: str) -> str:
    """``host:port``, ``[v6]:port`` or ``unix:/path``."""
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").startswith("/"):
            raise ConfigError(f"takes unix:/absolute/path, not {text!r}")
        return text
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"takes host:port or unix:/path, not {text!r}")
    return text


def _addresses(text: str) -> list[str]:
    return [_address(part.strip()) for part in text.split(",") if part.strip()]


def _assignment(text: str) -> list[tuple[str, str]]:
    parts = [part for part in text.split(",") if part]
    pairs = [tuple(part.split("=", 1)) for part in parts]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ConfigError(f"takes NAME=PATH, not {text!r}")
    return [(pair[0], pair[1]) for pair in pairs]


def _boolean(text: str) -> bool:
    if text.lower() not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
        raise ConfigError(f"takes true or false, not {text!r}")
    return text.lower() in ("1", "true", "yes", "on")


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"names a file that does not exist: {text}")
    return path


def _prefix(text: str) -> str:
    if not text or "/" in text.removeprefix("/") or not text.removeprefix("/"):
        raise ConfigError(f"takes the beginning of a shared-memory name, without directories, not {text!r}")
    return text.removeprefix("/")


_OPTIONS = (
    _Option("listen", "where clients connect (port 0: the kernel's choice)", _address, default="127.0.0.1:50051"),
    _Option("port-file", "file to write the bound address to", Path),
    _Option("shard", "a rank's daemon; repeat in rank order, or give one comma list", _addresses, repeat=True),
    _Option("state-dir", "directory of the desired-state file (default: memory only)", Path),
    _Option("load", "NAME=PATH to serve from the start; repeatable", _assignment, repeat=True),
    _Option("queue-size", "requests that may wait", _number(int, 1, 1_000_000), default=256),
    _Option(
        "overload-factor",
        "under overload, refuse who would wait for more than so many times the usual latency; 0: only by queue-size",
        _number(float, 0, 1000),
        default=2.5,
    ),
    _Option("max-message-bytes", "largest message", _number(int, 1024, MAX_MESSAGE), default=MAX_MESSAGE),
    _Option("heartbeat-ms", "between heartbeats", _number(float, 10, 60_000), default=250.0),
    _Option("heartbeat-timeout-ms", "after which a rank is lost", _number(float, 50, 600_000), default=1000.0),
    _Option("forward-bound-seconds", "one forward's bound; past it, hung", _number(float, 0.1, 86_400), default=60.0),
    _Option("lease-ms", "how long the ranks stay this coordinator's", _number(float, 100, 3_600_000), default=3000.0),
    _Option("join-timeout-seconds", "for the ranks to form a group", _number(float, 0.1, 3600), default=15.0),
    _Option("probe-interval-ms", "between collectives while idle", _number(float, 50, 600_000), default=1000.0),
    _Option("probe-bound-seconds", "after which an idle collective is hung", _number(float, 0.1, 3600), default=10.0),
    _Option("load-stall-seconds", "without progress, a load has failed", _number(float, 1, 86_400), default=600.0),
    _Option("batch-rows", "rows joined at most into one forward", _number(int, 1, 1_000_000), default=64),
    _Option(
        "batch-delay-us", "how long a request may wait to be joined", _number(float, 0, 10_000_000), default=1000.0
    ),
    _Option("pipeline-depth", "forwards at the ranks at a time", _number(int, 1, 16), default=2),
    _Option("drain-seconds", "for accepted work to finish on SIGTERM", _number(float, 0, 86_400), default=30.0),
    _Option("health-listen", "plaintext port with grpc.health.v1 and nothing else", _address),
    _Option("metrics-listen", "HTTP port of the Prometheus metrics", _address),
    _Option("tls-cert", "PEM certificate of this server", _file),
    _Option("tls-key", "PEM key of this server", _file),
    _Option("tls-client-ca", "PEM authority whose client certificates are required", _file),
    _Option("token-file", "file with the bearer token that clients must send", _file),
    _Option("shard-tls-ca", "PEM authority of the daemons' certificates", _file),
    _Option("shard-tls-cert", "PEM certificate shown to the daemons", _file),
    _Option("shard-tls-key", "PEM key for --shard-tls-cert", _file),
    _Option("shard-tls-name", "name in the daemons' certificates (default: their host)"),
    _Option("shard-token-file", "file with the bearer token for the daemons", _file),
    _Option("enable-shared-memory", "let clients register shared memory whose name begins so", _prefix),
    _Option("local-channel", "socket and shared memory to daemons on this host", _boolean, default=True),
    _Option("log-level", "least level", _choice("debug", "info", "warning", "error", "critical"), default="info"),
    _Option("log-format", "how log lines look", _choice("auto", "json", "console"), default="auto"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Config:
    """Raises ConfigError for anything unknown, malformed or missing; ``--help`` prints and exits 0."""
    parser = _Parser(prog="coordinator", description=__doc__.split(".")[0], allow_abbrev=False)
    for option in _OPTIONS:
        action = "append" if option.repeat else "store"
        shown = f" (default {option.default})" if option.default is not None else ""
        parser.add_argument(f"--{option.flag}", action=action, help=f"{option.help}{shown} [{option.variable}]")
    given = vars(parser.parse_args(list(argv)))
    known = {option.variable for option in _OPTIONS}
    unknown = sorted(
        name for name in environ if name.startswith(PREFIX) and name not in known and not SERVICE_LINK.fullmatch(name)
    )
    if unknown:
        raise ConfigError(f"unknown environment variable {unknown[0]}")
    return _build({option.key: _value(option, given[option.key], environ) for option in _OPTIONS})


def _value(option: _Option, given: Any, environ: Mapping[str, str]) -> Any:
    source = f"--{option.flag}" if given is not None else option.variable
    if given is None:
        text = environ.get(option.variable)
        if text is None or text == "":
            return [] if option.repeat else option.default
        given = [text] if option.repeat else text
    try:
        if option.repeat:
            return [item for text in given for item in option.parse(text)]
        return option.parse(given)
    except ConfigError as error:
        raise ConfigError(f"{source} {error}") from None


def _build(values: dict[str, Any]) -> Config:
    if not values["shard"]:
        raise ConfigError("--shard is required, once per rank and in rank order")
    if len(set(values["shard"])) != len(values["shard"]):
        raise ConfigError("--shard names one address twice")
    names = [name for name, _ in values["load"]]
    if len(set(names)) != len(names):
        raise ConfigError("--load names one model twice")
    tls = _tls("tls", values["tls_cert"], values["tls_key"], values["tls_client_ca"])
    if tls.ca is not None and tls.cert is None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    return Config(
        shards=tuple(values["shard"]),
        listen=values["listen"],
        port_file=values["port_file"],
        state_dir=values["state_dir"],
        loads=tuple(values["load"]),
        queue_size=values["queue_size"],
        overload_factor=values["overload_factor"],
        max_message_bytes=values["max_message_bytes"],
        heartbeat=values["heartbeat_ms"] / 1e3,
        heartbeat_timeout=values["heartbeat_timeout_ms"] / 1e3,
        forward_bound=values["forward_bound_seconds"],
        lease=values["lease_ms"] / 1e3,
        join_timeout=values["join_timeout_seconds"],
        probe_interval=values["probe_interval_ms"] / 1e3,
        probe_bound=values["probe_bound_seconds"],
        load_stall=values["load_stall_seconds"],
        batch_rows=values["batch_rows"],
        batch_delay=values["batch_delay_us"] / 1e6,
        pipeline_depth=values["pipeline_depth"],
        drain=values["drain_seconds"],
        health_listen=values["health_listen"],
        metrics_listen=values["metrics_listen"],
        tls=tls,
        token=_token("token-file", values["token_file"]),
        shard_tls=_tls("shard-tls", values["shard_tls_cert"], values["shard_tls_key"], values["shard_tls_ca"]),
        shard_tls_name=values["shard_tls_name"],
        shard_token=_token("shard-token-file", values["shard_token_file"]),
        shared_memory_prefix=values["enable_shared_memory"],
        local_channel=values["local_channel"],
        log_level=values["log_level"],
        log_format=values["log_format"],
    )


def _tls(flag: str, cert: Path | None, key: Path | None, ca: Path | None) -> TlsConfig:
    if (cert is None) != (key is None):
        raise ConfigError(f"--{flag}-cert and --{flag}-key go together")
    return TlsConfig(cert, key, ca)


def _token(flag: str, path: Path | None) -> str | None:
    if path is None:
        return None
    token = path.read_text(encoding="utf-8").strip()
    if not token or not token.isascii() or any(character.isspace() for character in token):
        raise ConfigError(f"--{flag} must hold one token of printable ASCII characters")
    return token
