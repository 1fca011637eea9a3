"""What a safetensors file says of its tensors, without a tensor library. Knows no checkpoint.

Reads the header (8 bytes of length, then JSON) as the safetensors format describes it; nothing is unpickled and no
tensor is allocated before the header has been checked against the size of the file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
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
    header, length = _header(path)
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


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says beside its tensors. Raises CheckpointError for a header that is none."""
    found = _header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{path} has a damaged header: __metadata__ is no object of strings")
    return found


def copy_with(metadata: Mapping[str, str], source: Path | None, target: Path) -> None:
    """Write the tensors of a file (None: no tensor) to another one that says this beside them."""
    header, length = ({}, 0) if source is None else _header(source)
    packed = json.dumps({**header, "__metadata__": {**metadata}}, ensure_ascii=False).encode()
    packed += b" " * (-len(packed) % 8)  # the tensors stay aligned
    with target.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        if source is not None:
            with source.open("rb") as tensors:
                tensors.seek(8 + length)
                shutil.copyfileobj(tensors, file, _PIECE)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(the header as it stands, its bytes)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is not a whole safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: it is no object")
    return header, length


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
