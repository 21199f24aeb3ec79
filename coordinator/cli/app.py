"""The command line: its verbs, and what every failure of theirs turns into."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from typing import Any

import click

from coordinator.cli.failures import EXIT_CODES, Failure, explain, leave
from coordinator.cli.settings import settings_of, shared

# Verb -> where it is; imported when asked for, so that `--help` and completion answer at once.
_VERBS = {
    "up": "coordinator.cli.up",
    "node": "coordinator.cli.node",
    "load": "coordinator.cli.models",
    "unload": "coordinator.cli.models",
    "models": "coordinator.cli.models",
    "forward": "coordinator.cli.forward",
    "health": "coordinator.cli.health",
    "plan": "coordinator.cli.plan",
    "top": "coordinator.cli.top",
    "logs": "coordinator.cli.logs",
    "bench": "coordinator.cli.bench",
    "demo": "coordinator.cli.demo",
    "completion": "coordinator.cli.completion",
}


class _Verbs(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command = getattr(import_module(_VERBS[name]), name)
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        said = bool(args)
        try:
            return super().parse_args(context, args)
        except click.UsageError as error:
            if not said:  # which shows the help
                raise
            leave(_misused(error), as_json=bool(settings_of(context).json))

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except click.ClickException as error:
            leave(_misused(error), as_json=bool(settings_of(context).json))
        except Exception as error:
            settings = settings_of(context)
            leave(_failure(error, settings.address), as_json=bool(settings.json))


def _misused(error: click.ClickException) -> Failure:
    """In one line like every failure, where click would print the usage above it."""
    context = getattr(error, "ctx", None)
    hint = f"`{context.command_path} --help` says how" if context is not None else ""
    return Failure(error.format_message().replace("\n", " "), error.exit_code, hint)


def _failure(error: Exception, target: str) -> Failure:
    if isinstance(error, Failure):
        return error
    client = sys.modules.get("coordinator.client")
    if client is not None and isinstance(error, client.RequestError):
        return explain(error, target)
    if isinstance(error, OSError) and error.strerror:
        return Failure(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if os.environ.get("SHARDCTL_DEBUG"):
        raise error
    return Failure(f"{type(error).__name__}: {error}", hint="this is a bug; SHARDCTL_DEBUG=1 shows where")


@click.command(
    cls=_Verbs,
    name="shardctl",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXIT_CODES,
)
@click.version_option(package_name="tensor-parallel-service", prog_name="shardctl")
@click.pass_context
def shardctl(context: click.Context) -> None:
    """Runs and talks to a cluster that serves PyTorch models sharded over several devices.

    Start one with `up`, give it a model with `load`, use it with `forward`, watch it with `health` and `top`.
    Every option can also be set by a variable: SHARDCTL_TARGET for --target, and so on.
    """
    settings_of(context)


shardctl = shared(shardctl, variables=True)


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C++ messages are no lines of ours; errors are exceptions here
    try:
        shardctl()
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain again when it flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
