"""What a safetensors file says of its tensors, without a tensor library. Knows no checkpoint.

Reads the header (8 bytes of length, then JSON) as the safetensors format describes it; nothing is unpickled and no
tensor is allocated before the header has been checked against the size of the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtserve.errors import CheckpointError

if TYPE_CHECKING:
    from hashlib import _Hash

_MAX_HEADER = 100 * 2**20
_PIECE = 2**20
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, sorted. Raises CheckpointError if the header and the file's size disagree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is not a whole safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    header.pop("__metadata__", None)
    try:
        infos = {name: _info(name, entry, 8 + length) for name, entry in sorted(header.items())}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error!r}") from error
    for info in infos.values():
        bits = _BITS.get(info.dtype, 8)
        if info.end > size or info.start < 8 + length or (info.end - info.start) * 8 != math.prod(info.shape) * bits:
            found = f"{info.end - info.start} bytes for {info.dtype}{list(info.shape)}"
            raise CheckpointError(f"{path}: tensor {info.name} does not fit the file: {found}")
    return infos


def _info(name: str, entry: dict[str, Any], base: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(name, entry["dtype"], tuple(map(int, entry["shape"])), base + int(start), base + int(end))


def hash_tensors(path: Path, into: _Hash) -> None:
    """Feed name, shape, dtype and bytes of every tensor of a file, sorted by name, to a hash."""
    with path.open("rb") as file:
        for info in read_header(path).values():
            into.update(f"{info.name} {info.dtype} {list(info.shape)}\n".encode())
            file.seek(info.start)
            for at in range(info.start, info.end, _PIECE):  # a mapped file would count as memory of the process
                into.update(file.read(min(_PIECE, info.end - at)))


def parameters(path: Path) -> int:
    """Number of elements of all tensors of a file."""
    return sum(math.prod(info.shape) for info in read_header(path).values())
