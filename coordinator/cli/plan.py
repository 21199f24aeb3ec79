"""``shardctl plan``: what sharding a model would cost, before a weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.failures import USAGE, Failure
from coordinator.cli.settings import option, settings_of, shared
from coordinator.cli.show import console, print_json, size, table

if TYPE_CHECKING:
    from tensor_parallel.checkpoint.source import Source

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Size(click.ParamType[int]):
    """Bytes: 80GiB, 512MiB, 1e9."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(?:iB|B)?", str(value).strip(), re.IGNORECASE)
        try:
            if match is None:
                raise ValueError
            return int(float(match[1]) * _UNITS[match[2].upper()])
        except ValueError:
            self.fail(f"{value!r} is not a size, such as 80GiB", parameter, context)


@click.command(short_help="What sharding a model would cost, without a server or its weights.")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@option("--ranks", type=click.IntRange(min=1), required=True, help="Number of ranks.")
@option(
    "--device-memory", type=Size(), default=0, help="Memory of each device, such as 80GiB, to tell whether it fits."
)
@option("--dtype", default="", metavar="TYPE", help="Element type of the weights.  [default: the checkpoint's]")
@option("--architecture", default="", metavar="CLASS", help="Class to build, for Hugging Face directories.")
@click.pass_context
def plan(context: click.Context, /, path: Path, ranks: int, device_memory: int, dtype: str, architecture: str) -> None:
    """Prints how the model at PATH would be sharded over --ranks: bytes on each, collectives, and whether it fits.

    Runs here, from the model's description alone (config.json will do), so it needs torch: install the `shardd` or the
    `hf` extra. Exit code 1 if it does not fit in --device-memory.
    """
    report = make_report(path, ranks, device_memory, dtype, architecture)
    if settings_of(context).json:
        print_json(report)
    else:
        show(report)
    if report["fits"] is False:
        context.exit(1)


plan = shared(plan, only=("--json",))


def make_report(path: Path, ranks: int, device_memory: int, dtype: str, architecture: str) -> dict[str, Any]:
    """``fits`` is None where no device memory was given. Raises Failure when torch is missing, or the model is none."""
    try:
        # What a daemon does when it is asked for a plan; nothing else of the command line needs torch.
        from shardd.describing import plan_report
        from tensor_parallel.checkpoint import open_source
        from tensor_parallel.errors import TensorParallelError
        from tensor_parallel.planner import make_plan
    except ImportError as error:
        hint = "pip install 'tensor-parallel-service[hf]'"
        raise Failure(f"plan needs {error.name or 'torch'}, which is not installed here", USAGE, hint) from None
    options = {key: value for key, value in (("dtype", dtype), ("architecture", architecture)) if value}
    where = path.resolve()
    try:
        if where.is_dir() and not any(where.glob("*.safetensors*")):
            source = _from_config(where, options)
        else:
            source = open_source(where.name, where.parent, "auto", options)
        plan = make_plan(source.build_meta(), source.example_inputs(), ranks, gather_outputs=False, verify=False)
    except TensorParallelError as error:
        raise Failure(str(error)) from None
    report: dict[str, Any] = json.loads(plan_report(plan, str(path), device_memory).report_json)
    return report | {"fits": report["fits"] if device_memory else None}


def _from_config(directory: Path, options: dict[str, Any]) -> Source:
    from tensor_parallel.checkpoint.huggingface_config import ConfigSource
    from tensor_parallel.checkpoint.options import SourceOptions

    return ConfigSource(directory, SourceOptions.parse(options, ()))


def show(report: dict[str, Any]) -> None:
    out = console()
    collectives = ", ".join(f"{n} {name.replace('_', '-')}" for name, n in report["collectives"].items() if n)
    out.print(f"[bold]{report['path']}[/bold]: {size(report['total_bytes'])}, plan {report['mode']}")
    out.print(f"collectives of a forward: {collectives or 'none'}")
    total = report["total_bytes"] or 1
    rows = [(rank, size(held), f"{held / total:.1%}") for rank, held in enumerate(report["bytes_per_rank"])]
    out.print(table("", (">rank", ">holds", ">of the model"), rows))
    for reason in report["gathered"]:
        out.print(f"gathered at {reason['where']}: {reason['why']}")
    for note in report["notes"]:
        out.print(f"[yellow]note[/yellow] {note}")
    if report["fits"] is not None:
        memory = size(report["device_memory"])
        out.print(f"fits in {memory}" if report["fits"] else f"[red]does not fit[/red] in {memory} a device")
