"""What one daemon is told: flags and ``SHARDD_*`` variables, read once into a frozen value.

Every flag ``--some-flag`` has the variable ``SHARDD_SOME_FLAG``; the flag wins. An unknown flag, an unknown
``SHARDD_*`` variable or a value that makes no sense is refused with one line that names it. Imports nothing heavy: a
typing mistake must be answered at once, not after torch has been imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from shardd.addresses import Address, parse_address

PREFIX = "SHARDD_"
DESCRIPTION = (
    "One rank of a tensor-parallel model server: holds this rank's weights and runs what its coordinator sends."
)
MAX_MESSAGE = 2**31 - 1


class ConfigError(ValueError):
    """The daemon cannot start as told; the message is one line for whoever started it."""


@dataclass(frozen=True)
class Config:
    """The settings of one daemon; see ``OPTIONS`` for what each means."""

    rank: int
    world_size: int
    listen: Address = field(default_factory=lambda: Address("127.0.0.1", 0))
    port_file: Path | None = None
    device: str = "auto"
    gpu_uuid: str = ""
    allow_shared_gpu: bool = False
    model_root: Path | None = None
    backend: str = "auto"
    allow_factory: tuple[str, ...] = ()
    advertise: str = ""
    interface: str = ""
    threads: int = 0
    cpus: str | tuple[int, ...] = "auto"
    local_rank: int = 0
    local_ranks: int = 0
    drain_seconds: float = 30.0
    fence_seconds: float = 10.0
    stuck_seconds: float = 60.0
    health_listen: Address | None = None
    metrics_listen: Address | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    max_message_bytes: int = MAX_MESSAGE
    log_level: str = "info"
    log_format: str = "auto"
    token: str = field(default="", repr=False)


@dataclass(frozen=True)
class Option:
    """One flag: how its text becomes a value, and what ``--help`` says."""

    name: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    repeated: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


def _whole(least: int = 0) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise ValueError(f"must be a whole number of at least {least}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ValueError("must be a number of seconds, 0 or more")
    return value


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return parse


def _switch(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise ValueError("must be true or false")
    return values[text.lower()]


def _device(text: str) -> str:
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isascii() and index.isdigit()):
        return text
    raise ValueError("must be auto, cpu, cuda or cuda:N")


def parse_cpus(text: str) -> list[int]:
    """The CPUs of a list such as ``0-7,16-23``, in order and each once. Raises ``ValueError``."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last if dash else first)
        if not all(number.isascii() and number.isdigit() and len(number) < 6 for number in numbers):
            raise ValueError("must be auto, none, or CPU numbers and ranges of them, such as 0-7,16-23")
        cpus.update(range(int(numbers[0]), int(numbers[1]) + 1))
    return sorted(cpus)


def _cpu_list(text: str) -> str | tuple[int, ...]:
    if text in ("auto", "none"):
        return text
    if not (cpus := parse_cpus(text)):
        raise ValueError("names no CPU")
    return tuple(cpus)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise ValueError("is not a directory" if path.exists() else "does not exist")
    return path.resolve()


def _file(text: str) -> Path:
    path = Path(text)
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _port_file(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise ValueError("is in a directory that does not exist")
    return path


def _factory(text: str) -> str:
    module, colon, name = text.partition(":")
    if not colon or not all(part.isidentifier() for part in module.split(".")) or not name.isidentifier():
        raise ValueError("must be PACKAGE.MODULE:NAME")
    return text


def _host(text: str) -> str:
    if not text or any(character.isspace() or character in "/@" for character in text):
        raise ValueError("must be a host name or an address")
    return text


OPTIONS = (
    Option("rank", _whole(), "N", "this daemon's rank, from 0 (required)"),
    Option("world_size", _whole(1), "N", "number of ranks (required)"),
    Option("listen", parse_address, "ADDR", "HOST:PORT (port 0: the kernel's choice) or unix:PATH [127.0.0.1:0]"),
    Option("port_file", _port_file, "PATH", "written once bound, with the address to reach this daemon at"),
    Option("device", _device, "DEV", "auto, cpu, cuda or cuda:N [auto]"),
    Option("gpu_uuid", str, "UUID", "refuse to start unless the GPU used is this one"),
    Option("allow_shared_gpu", _switch, "", "start although another daemon uses the same GPU"),
    Option("model_root", _directory, "DIR", "models are read below this directory only"),
    Option("backend", _choice("auto", "gloo", "shm", "nccl"), "KIND", "auto, gloo, shm or nccl [auto]"),
    Option("allow_factory", _factory, "PKG.MOD:NAME", "a model factory that may be loaded; repeatable", repeated=True),
    Option("advertise", _host, "HOST", "address at which the other ranks reach this one"),
    Option("interface", _host, "IFACE", "network interface for the traffic between ranks"),
    Option("threads", _whole(), "N", "CPU threads for computing; 0: this rank's share of the cores [0]"),
    Option(
        "cpus",
        _cpu_list,
        "LIST",
        "CPUs that the computing threads keep to, such as 0-7,16-23; auto: cores of this rank's own, if this host has "
        "one for every thread of every rank and one more; none: wherever the process may run [auto]",
    ),
    Option("local_rank", _whole(), "N", "this daemon's number, from 0, among those of its host [0]"),
    Option("local_ranks", _whole(), "N", "number of daemons on this host, for --cpus auto; 0: not known [0]"),
    Option("drain_seconds", _seconds, "S", "on SIGTERM, how long running work may take to finish [30]"),
    Option("fence_seconds", _seconds, "S", "exit (code 70) if an aborted forward has not let go by then [10]"),
    Option("stuck_seconds", _seconds, "S", "a forward without progress for so long counts as stuck [60]"),
    Option("health_listen", parse_address, "ADDR", "also serve grpc.health.v1, and only that, here, in plain text"),
    Option("metrics_listen", parse_address, "ADDR", "serve Prometheus metrics over HTTP here"),
    Option("tls_cert", _file, "FILE", "certificate chain (PEM)"),
    Option("tls_key", _file, "FILE", "private key (PEM)"),
    Option("tls_client_ca", _file, "FILE", "ask callers for a certificate signed by one of these (PEM)"),
    Option("token_file", _file, "FILE", "callers must send this bearer token"),
    Option("max_message_bytes", _whole(1), "N", "largest gRPC message taken [2 GiB - 1]"),
    Option("log_level", _choice("debug", "info", "warning", "error"), "LEVEL", "debug, info, warning or error [info]"),
    Option("log_format", _choice("auto", "json", "console"), "FORMAT", "auto (console on a terminal), json or console"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Flags over variables over defaults. Raises :class:`ConfigError`; ``--help`` prints and raises ``SystemExit``."""
    given = vars(_parser().parse_args(list(arguments)))
    variables = {option.variable: option for option in OPTIONS}
    for variable in sorted(environment):
        if variable.startswith(PREFIX) and variable not in variables:
            raise ConfigError(f"{variable} is set, but there is no such setting")
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if given[option.name] is not None:
            values[option.name] = _parse(option, option.flag, given[option.name])
        elif environment.get(option.variable):
            text = environment[option.variable]
            values[option.name] = _parse(option, option.variable, text.split(",") if option.repeated else text)
    for name in ("rank", "world_size"):
        if name not in values:
            raise ConfigError(f"--{name.replace('_', '-')} is required")
    config = Config(**values, token=_read_token(values.get("token_file")))
    _check(config)
    return config


def _parser() -> _Parser:
    parser = _Parser(prog="shardd", description=DESCRIPTION, allow_abbrev=False)
    for option in OPTIONS:
        text = f"{option.help} ({option.variable})".replace("%", "%%")
        if option.parse is _switch:
            parser.add_argument(option.flag, dest=option.name, nargs="?", const="true", metavar="BOOL", help=text)
        else:
            action = "append" if option.repeated else "store"
            parser.add_argument(option.flag, dest=option.name, action=action, metavar=option.metavar, help=text)
    return parser


def _parse(option: Option, source: str, text: str | list[str]) -> Any:
    try:
        if isinstance(text, list):
            return tuple(option.parse(part.strip()) for part in text)
        return option.parse(text)
    except ValueError as error:
        raise ConfigError(f"{source}: {text!r} {error}") from None


def _read_token(path: Path | None) -> str:
    if path is None:
        return ""
    token = path.read_text(encoding="utf-8", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"--token-file: {str(path)!r} must hold one token of printable characters")
    return token


def _check(config: Config) -> None:
    """What no single value shows."""
    if config.rank >= config.world_size:
        raise ConfigError(f"--rank: {config.rank} must be less than --world-size {config.world_size}")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    if config.local_ranks and config.local_rank >= config.local_ranks:
        raise ConfigError(f"--local-rank: {config.local_rank} must be less than --local-ranks {config.local_ranks}")
    if config.model_root is None and not config.allow_factory:
        raise ConfigError("--model-root is required (or --allow-factory): nothing could be loaded")
    if config.metrics_listen is not None and config.metrics_listen.is_unix:
        raise ConfigError("--metrics-listen: must be HOST:PORT")
    if config.backend == "nccl" and config.device == "cpu":
        raise ConfigError("--backend nccl needs a GPU, but --device is cpu")
    if config.backend == "shm" and config.device.startswith("cuda"):
        raise ConfigError(f"--backend shm is for the CPU, but --device is {config.device}")


assert {option.name for option in OPTIONS} == {field.name for field in fields(Config)} - {"token"}
