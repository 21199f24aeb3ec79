"""Options that every verb shares, and how a verb gets its client.

They stand before the verb or after it: ``shardctl --target host:1 health`` and ``shardctl health --target host:1``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from coordinator.client import AsyncClient, Client

_Command = TypeVar("_Command", bound=Callable[..., Any])

DEFAULT_TARGET = "127.0.0.1:50051"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass
class Settings:
    """The shared options, None where not given."""

    target: str | None = None
    token_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    timeout: float | None = None
    json: bool | None = None

    @property
    def address(self) -> str:
        return self.target or DEFAULT_TARGET

    def client(self, **changes: Any) -> Client:
        from coordinator.client import Client

        return Client(self.address, **self._arguments() | changes)

    def async_client(self, **changes: Any) -> AsyncClient:
        from coordinator.client import AsyncClient

        return AsyncClient(self.address, **self._arguments() | changes)

    def _arguments(self) -> dict[str, Any]:
        from coordinator.client import Tls

        tls = self.tls_ca is not None or self.tls_cert is not None
        return {
            "token": read_token(self.token_file),
            "tls": Tls(self.tls_ca, self.tls_cert, self.tls_key) if tls else None,
            **({"timeout": self.timeout} if self.timeout is not None else {}),
        }


def read_token(path: Path | None) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path is not None else None


def option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    """A click option that ``SHARDCTL_<FLAG>`` sets as well."""
    flag = next(name for name in names if name.startswith("--")).split("/")[0]
    return click.option(*names, envvar="SHARDCTL_" + flag.strip("-").upper().replace("-", "_"), **settings)


_SHARED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--target", {"metavar": "HOST:PORT", "help": f"The coordinator.  [default: {DEFAULT_TARGET}]"}),
    ("--token-file", {"type": FILE, "help": "File with the bearer token."}),
    ("--tls-ca", {"type": FILE, "help": "Use TLS; the server's certificate is signed by this (PEM)."}),
    ("--tls-cert", {"type": FILE, "help": "Mutual TLS: our certificate (PEM)."}),
    ("--tls-key", {"type": FILE, "help": "Mutual TLS: its key (PEM)."}),
    ("--timeout", {"type": click.FloatRange(min=0, min_open=True), "help": "Seconds a call may take.  [default: 60]"}),
    ("--json", {"is_flag": True, "default": None, "help": "Print JSON, for programs."}),
)


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None and parameter.name is not None:
        setattr(context.ensure_object(Settings), parameter.name, value)


def shared(command: _Command, *, variables: bool = False, only: tuple[str, ...] = ()) -> _Command:
    """Adds the shared options (those in ``only``). Variables are read for the group alone: a flag before the verb would
    else lose to a variable read after it."""
    for name, settings in reversed(_SHARED):
        if only and name not in only:
            continue
        add = option if variables else click.option
        command = add(name, expose_value=False, callback=_store, is_eager=True, **settings)(command)
    return command


def settings_of(context: click.Context) -> Settings:
    return context.ensure_object(Settings)
