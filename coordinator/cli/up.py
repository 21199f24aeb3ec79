"""``shardctl up``: a whole cluster on this machine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.settings import FILE, Settings, option, settings_of, shared

if TYPE_CHECKING:
    from coordinator.cli.running import Running

FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
DIRECTORY = click.Path(file_okay=False, path_type=Path)


def node_options(command: Any) -> Any:
    """What `up` and `node` share: the daemons of this machine."""
    options = (
        option("--ranks", type=click.IntRange(min=1), required=True, help="Number of ranks here, one daemon each."),
        option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        option("--model-root", type=DIRECTORY, help="Models are read below this directory only."),
        option("--allow-factory", multiple=True, metavar="PKG.MOD:NAME", help="A factory that may be loaded; repeat."),
        option("--allow-shared-gpu", is_flag=True, help="More ranks than GPUs, several on each (slow: over gloo)."),
        option(
            "--threads", type=click.IntRange(min=0), default=0, help="CPU threads of a rank.  [default: a fair share]"
        ),
        option("--backend", type=click.Choice(["auto", "gloo", "shm", "nccl"]), default="auto", show_default=True),
        option(
            "--spare/--no-spare",
            default=None,
            help="Keep a process of which ranks are made in milliseconds, everything imported.  [default: on CPUs]",
        ),
        option("--drain-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="For an end."),
        option("--log-dir", type=DIRECTORY, help="Write each process's log there as well."),
        option(
            "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
        ),
    )
    for add in reversed(options):
        command = add(command)
    return command


@shared
@click.command(short_help="Start and supervise a whole cluster on this machine.")
@node_options
@option("--host", default="127.0.0.1", show_default=True, help="Address that clients connect to.")
@option("--port", type=click.IntRange(0, 65535), default=50051, show_default=True, help="0: the kernel's choice.")
@option("--load", multiple=True, metavar="NAME=PATH", help="A model to serve from the start; repeat.")
@option("--state-dir", type=DIRECTORY, help="Remember what is loaded here, over restarts of the whole cluster.")
@option("--server-cert", type=FILE, help="Serve TLS with this certificate (PEM).")
@option("--server-key", type=FILE, help="Its key (PEM).")
@click.pass_context
def up(context: click.Context, /, load: tuple[str, ...], **options: Any) -> None:
    """Starts one daemon per rank and a coordinator, keeps them running, and ends with them (Ctrl-C drains).

    Prints a line `READY target=HOST:PORT` when Forward can be called (with --json an object with ready, target, pids
    and models). Whatever dies is restarted: a rank keeps its place, the coordinator its port. The daemons take further
    settings from SHARDD_* variables and the coordinator from COORDINATOR_*; --token-file is the token that clients must
    send.
    """
    import asyncio

    from coordinator.cli.running import run

    settings = settings_of(context)
    models = [_model(text, options["model_root"]) for text in load]
    node, front = _specs(settings, options)
    asyncio.run(run(node, front, models, settings, lambda running: announce(running, as_json=bool(settings.json))))


def _model(text: str, root: Path | None) -> tuple[str, str]:
    """Name and path. Raises click.UsageError for what is known to be wrong before anything is started."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise click.BadParameter(f"--load {text!r} is not NAME=PATH")
    if root is None or not root.is_dir() or FACTORY.fullmatch(path):
        return name, path
    found, shown = root / path, f"--load {text}"
    if ".." in Path(path).parts or not found.is_relative_to(root):
        raise click.UsageError(f"{shown}: models are read below {str(root)!r} only")
    if not found.exists():
        raise click.UsageError(f"{shown}: no {path!r} below {str(root)!r}")
    if found.is_dir() and not (found / "config.json").exists():
        raise click.UsageError(f"{shown}: there is no config.json in {str(found)!r}, so it is no model")
    return name, path


def _specs(settings: Settings, options: dict[str, Any]) -> tuple[Any, Any]:
    from coordinator.supervisor.cluster import Front

    if (options["server_cert"] is None) != (options["server_key"] is None):
        raise click.UsageError("--server-cert and --server-key go together")
    if options["model_root"] is None and not options["allow_factory"]:
        raise click.UsageError("--model-root DIR is needed (or --allow-factory): nothing could be loaded")
    front = Front(
        host=options.pop("host"),
        port=options.pop("port"),
        state_dir=options.pop("state_dir"),
        token_file=settings.token_file,
        tls_cert=options.pop("server_cert"),
        tls_key=options.pop("server_key"),
        drain_seconds=options["drain_seconds"],
    )
    return make_node(options), front


def make_node(options: dict[str, Any]) -> Any:
    """Checks the directories and makes the Node. Raises click.UsageError."""
    from coordinator.supervisor.cluster import Node

    root, log_dir = options["model_root"], options["log_dir"]
    for factory in options["allow_factory"]:
        if not FACTORY.fullmatch(factory):
            raise click.UsageError(f"--allow-factory {factory!r} is not PACKAGE.MODULE:NAME")
    if root is not None and not root.is_dir():
        raise click.UsageError(f"--model-root: no directory {str(root)!r}")
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
    backend = "" if options["backend"] == "auto" else options["backend"]
    resolved = root.resolve() if root is not None else None
    return Node(**options | {"backend": backend, "model_root": resolved})


def announce(running: Running, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(running.describe()), flush=True)
        return
    print(f"READY target={running.target}", flush=True)
    flags = "" if running.target == "127.0.0.1:50051" else f" --target {running.target}"
    for model in running.models:
        print(f"  serving {model['name']} version {model['version']}")
    print("Call it:")
    if not running.models:
        print(f"  shardctl load{flags} NAME PATH      # PATH below the model root")
    name = running.models[0]["name"] if running.models else "NAME"
    inputs = [spec["name"] for spec in running.models[0]["inputs"] if not spec["optional"]] if running.models else []
    arguments = " ".join(f"--input {each}={each}.npy" for each in inputs or ["x"])
    print(f"  shardctl forward{flags} {name} {arguments} --output out.npz")
    print(f"  shardctl health{flags}")
    print(f'  python: coordinator.client.Client("{running.target}").forward("{name}", {{...}})')
    print("Ctrl-C ends it.", flush=True)
    sys.stdout.flush()
