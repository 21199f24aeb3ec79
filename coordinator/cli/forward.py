"""``shardctl forward``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.failures import Failure
from coordinator.cli.settings import option, settings_of, shared
from coordinator.cli.show import console, print_json, table

if TYPE_CHECKING:
    from coordinator.client import Client


@shared
@click.command(short_help="Run a model on inputs from files, JSON or text.")
@click.argument("name")
@option("--input", "inputs", multiple=True, metavar="NAME=VALUE", help="See above; repeat.")
@option("--text", "texts", multiple=True, help="For a model with a tokenizer: a row of text; repeat.")
@option(
    "--tokenizer", type=click.Path(exists=True, path_type=Path), help="tokenizer.json, where the model's is not here."
)
@option("--output", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True), metavar="FILE", help="See above.")
@option("--only", multiple=True, metavar="OUTPUT", help="Outputs wanted.  [default: all]")
@option("--model-version", default="", metavar="VERSION", help="[default: the one that serves]")
@option("--request-id", default=None, metavar="ID", help="Id to find the request by in the logs.")
@option("--retries", type=click.IntRange(min=0), default=0, show_default=True, help="Calls again after UNAVAILABLE.")
@click.pass_context
def forward(context: click.Context, /, name: str, inputs: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Runs the model NAME once.

    VALUE of --input is a .npy, .npz or .safetensors file, a JSON literal such as '[[1, 2]]' (of the element type that
    the model declares, or NAME:TYPE=...), @FILE with such JSON, or - for a .npy on standard input. --input FILE.npz or
    FILE.safetensors gives every input by its name.

    --output is a .npz, .npy or .safetensors file, or - for JSON on standard output; without it, a summary is printed.
    """
    from coordinator.cli import tensor_files
    from coordinator.cli.inputs import gather

    settings = settings_of(context)
    with settings.client(retries=options["retries"]) as client:
        arrays = gather(inputs, options["texts"], options["tokenizer"], lambda: describe(client, name))
        begin = time.perf_counter()
        outputs = client.forward(
            name,
            arrays,
            outputs=options["only"] or None,
            version=options["model_version"],
            request_id=options["request_id"],
        )
        seconds = time.perf_counter() - begin
    if output is not None and str(output) == "-":
        tensor_files.write_json(outputs)
        return
    if output is not None:
        tensor_files.write(output, outputs)
    if settings.json:
        print_json(
            {"model": name, "seconds": seconds, "outputs": {k: _describe(v, output) for k, v in outputs.items()}}
        )
    else:
        rows = [
            (key, value.dtype.name, "x".join(map(str, value.shape)), _preview(value)) for key, value in outputs.items()
        ]
        console().print(table("", ("output", "type", "shape", "values"), rows))
        print(f"{seconds * 1000:.1f} ms" + (f", written to {output}" if output is not None else ""))


def describe(client: Client, name: str) -> dict[str, Any]:
    """The model's description. Raises Failure naming those that there are."""
    models = client.models()
    for model in models:
        if model["name"] == name:
            return model
    known = ", ".join(model["name"] for model in models) or "none"
    raise Failure(f"NOT_FOUND: no model {name!r}; loaded: {known}", hint="load it with `shardctl load NAME PATH`")


def _describe(array: Any, output: Path | None) -> dict[str, Any]:
    from coordinator.cli.tensor_files import values

    found = {"dtype": array.dtype.name, "shape": list(array.shape)}
    return found if output is not None else found | {"data": values(array)}


def _preview(array: Any) -> str:
    import numpy as np

    with np.printoptions(precision=4, threshold=6, edgeitems=3):
        return " ".join(str(array.reshape(-1)).split())
