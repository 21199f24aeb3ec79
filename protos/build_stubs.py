"""Build step: compiles ``protos/**/*.proto`` into Python, for wheels and for editable installs.

``tensor_parallel/v1`` becomes ordinary ``_pb2`` and ``_pb2_grpc`` modules.  They are compiled from the repository
root, so that they import as ``protos.tensor_parallel.v1...``: compiled from ``protos/`` they would import the
``tensor_parallel`` library, and with it torch, into the coordinator.  ``inference`` (the Open Inference Protocol)
becomes one descriptor file, which the server loads into a descriptor pool of its own: the default pool refuses a second
package of that name beside ``tritonclient``'s in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("protos/tensor_parallel/v1")
INFERENCE = Path("protos/inference")
DESCRIPTORS = INFERENCE / "descriptors.binpb"


def compile_stubs(out: Path) -> list[Path]:
    """Compiles everything below ``out``; returns the files made, relative to it. Raises RuntimeError on a bad proto."""
    import grpc_tools
    from grpc_tools import protoc

    include = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).glob("*.proto"))
    common = ["protoc", f"-I{ROOT}", f"-I{include}"]
    flags = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main([*common, *flags, *sources]) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(sources)}")
    made = [
        PACKAGE / (Path(source).stem + suffix)
        for source in sources
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    ]
    inference = sorted(str(path.relative_to(ROOT)) for path in (ROOT / INFERENCE).glob("*.proto"))
    if inference:
        (out / INFERENCE).mkdir(parents=True, exist_ok=True)
        if protoc.main([*common, "--include_imports", f"--descriptor_set_out={out / DESCRIPTORS}", *inference]) != 0:
            raise RuntimeError(f"protoc failed on {', '.join(inference)}")
        made.append(DESCRIPTORS)
    return made


class BuildPy(build_py):  # type: ignore[misc]
    """setuptools' ``build_py`` with the stubs added; an editable install gets them in the source tree."""

    def run(self) -> None:
        super().run()
        compile_stubs(ROOT if self.editable_mode else Path(self.build_lib))

    def get_source_files(self) -> list[str]:
        protos = [*(ROOT / PACKAGE).glob("*.proto"), *(ROOT / INFERENCE).glob("*.proto")]
        return [*super().get_source_files(), *(str(path.relative_to(ROOT)) for path in protos)]


if __name__ == "__main__":
    for made in compile_stubs(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT):
        print(made)
