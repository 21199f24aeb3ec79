"""Reading a pickle's instructions without following one: does it hold anything but plain tensors?"""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib

from tensor_parallel.errors import CheckpointError

_MAX_PICKLE_BYTES = 64 << 20

# Instructions that name a callable in a way only execution could resolve, or that run one that torch never writes.
_FORBIDDEN = frozenset({"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "PERSID"})

# Written for sample inputs that were exported without data; takes a description of a tensor.
_FAKE_TENSOR = "torch._export.serde.serialize _reconstruct_fake_tensor"


def check_pickle(data: bytes, what: str) -> None:
    """Raises :class:`CheckpointError` unless ``data`` is empty or a ``torch.save`` of tensors, numbers and
    containers of them.
    """
    if not data:
        return
    try:
        instructions = list(pickletools.genops(_pickle_of(data, what)))
    except (ValueError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is not what torch.export.save writes: {error}") from None
    allowed = _allowed()
    for opcode, argument, _ in instructions:
        if opcode.name in _FORBIDDEN or (opcode.name == "GLOBAL" and argument not in allowed):
            named = f"{opcode.name} {argument or ''}".strip()
            raise CheckpointError(f"{what} holds a pickle that would run code ({named[:100]})")


def _pickle_of(data: bytes, what: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(entries) != 1 or entries[0].file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{what} is not what torch.export.save writes")
        with archive.open(entries[0]) as member:
            return member.read(_MAX_PICKLE_BYTES)


def _allowed() -> frozenset[str]:
    from torch._weights_only_unpickler import _get_allowed_globals

    names = (name.rpartition(".") for name in _get_allowed_globals())
    return frozenset([*(f"{module} {name}" for module, _, name in names), _FAKE_TENSOR])
