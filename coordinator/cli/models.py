"""``shardctl load``, ``unload`` and ``models``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from coordinator.cli.settings import option, settings_of, shared
from coordinator.cli.show import console, print_json, size, table


@shared
@click.command(short_help="Load a model on every rank and serve it.")
@click.argument("name")
@click.argument("path")
@option("--version", default="", help="Version to serve it as.  [default: one more than the last]")
@option("--kind", type=click.Choice(["auto", "hf", "pt2", "factory"]), default="auto", show_default=True)
@option("--dtype", default="", metavar="TYPE", help="Element type of the weights, such as bfloat16.  [default: stored]")
@option("--architecture", default="", metavar="CLASS", help="Class to build, for Hugging Face directories.")
@option("--model-input", multiple=True, metavar="NAME:TYPE[SHAPE]", help="An input, such as x:float32[-1,8]; repeat.")
@option("--verify/--no-verify", default=None, help="Check the plan against the unsharded model first.  [default: yes]")
@option("--max-batch-size", type=click.IntRange(min=0), default=0, help="Rows of one request at most; 0: no limit.")
@option("--max-joined-rows", type=click.IntRange(min=0), default=0, help="Rows joined into one forward; 1: no joining.")
@option("--max-delay", type=click.FloatRange(min=0), default=0.0, help="Seconds a request may wait to be joined.")
@option("--arguments", default="", metavar="JSON", help="A factory's arguments, or overrides of the config.")
@option(
    "--execution",
    default="",
    metavar="HOW",
    help="eager, or compile to run what torch.compile makes of it.  [default: eager]",
)
@click.pass_context
def load(context: click.Context, /, name: str, path: str, version: str, **options: Any) -> None:
    """Loads PATH, which lies in the daemons' model root, on every rank and serves it as NAME.

    PATH is a Hugging Face directory, a .pt2 archive, or PACKAGE.MODULE:FUNCTION of an allowed factory. An older version
    of NAME serves until the new one does.
    """
    settings = settings_of(context)
    with settings.client(retries=0) as client, loading(name, quiet=bool(settings.json)) as progress:
        model = client.load(
            name,
            path,
            version=version,
            timeout=settings.timeout or 3600.0,
            progress=progress,
            **load_arguments(options),
        )
    if settings.json:
        print_json(model)
    else:
        console().print(summary(model))


def load_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The options of this command as those of `Client.load`."""
    found = dict(options)
    inputs, arguments = found.pop("model_input"), found.pop("arguments")
    return found | {"inputs": dict(map(_parse_spec, inputs)), "arguments": _parse_object(arguments)}


def _parse_spec(text: str) -> tuple[str, tuple[str, list[int]]]:
    name, colon, rest = text.partition(":")
    kind, bracket, shape = rest.removesuffix("]").partition("[")
    try:
        if not (name and colon and kind and bracket and rest.endswith("]")):
            raise ValueError
        return name, (kind, [int(part) for part in shape.split(",") if part.strip()])
    except ValueError:
        raise click.BadParameter(f"{text!r} is not NAME:TYPE[SHAPE], such as x:float32[-1,8]") from None


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"--arguments is not JSON: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise click.BadParameter("--arguments must be a JSON object")
    return value


@contextmanager
def loading(name: str, *, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A progress bar for each rank, on standard error; yields what to call with each report."""
    if quiet:
        yield None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console(stderr=True)) as bars:
        tasks: dict[int, rich_progress.TaskID] = {}

        def report(found: dict[str, Any]) -> None:
            for rank in found["ranks"]:
                number = rank["rank"]
                if number not in tasks:
                    tasks[number] = bars.add_task(name, total=None)
                bars.update(
                    tasks[number],
                    description=f"{name}, rank {number}: {rank['stage']}",
                    completed=rank["bytes_done"],
                    total=rank["bytes_total"] or None,
                )
            for warning in found["warnings"]:
                bars.console.print(f"[yellow]warning[/yellow] {warning}")

        yield report


def summary(model: dict[str, Any]) -> str:
    held = ", ".join(size(count) for count in model["bytes_per_rank"])
    counts = model["collectives"].items()
    collectives = ", ".join(f"{count} {name.replace('_', '-')}" for name, count in counts if count)
    total, mode = size(model["total_bytes"]), model["plan_mode"] or "?"
    return (
        f"serving {model['name']} version {model['version']}: the ranks hold {held} of {total}; "
        f"plan {mode}, {collectives or 'no collectives'}"
    )


@shared
@click.command(short_help="Stop serving a model and free its memory.")
@click.argument("name")
@click.pass_context
def unload(context: click.Context, name: str) -> None:
    """Stops serving NAME, and frees its memory on every rank."""
    settings = settings_of(context)
    with settings.client() as client:
        client.unload(name)
    print_json({"unloaded": name}) if settings.json else print(f"unloaded {name}")


@shared
@click.command(short_help="What is loaded: inputs, outputs, sizes, plan.")
@click.pass_context
def models(context: click.Context) -> None:
    """What is loaded: inputs, outputs, bytes on each rank, collectives of a forward."""
    settings = settings_of(context)
    with settings.client() as client:
        found = client.models()
    if settings.json:
        print_json(found)
        return
    if not found:
        print("no model is loaded; load one with `shardctl load NAME PATH`")
    out = console()
    for model in found:
        out.print(f"[bold]{model['path']}[/bold], {summary(model) if model['serving'] else '[red]not serving[/red]'}")
        specs = [("in", spec) for spec in model["inputs"]] + [("out", spec) for spec in model["outputs"]]
        rows = [(way, spec["name"], spec["dtype"], _shape(spec), _bounds(spec)) for way, spec in specs]
        out.print(table("", ("", "name", "type", "shape", "values"), rows))


def _shape(spec: dict[str, Any]) -> str:
    shape = " x ".join("any" if extent < 0 else str(extent) for extent in spec["shape"]) or "scalar"
    return shape + (" (optional)" if spec["optional"] else "")


def _bounds(spec: dict[str, Any]) -> str:
    low, high = spec["minimum"], spec["maximum"]
    return "" if low is None and high is None else f"{'' if low is None else low}..{'' if high is None else high}"
