"""Tensors of weight files that others wrote, by name, mapped into memory when they are asked for. Knows no model.

Of a mapped file only what is touched takes memory, and it is given back with the tensors; so many copies of a trunk can
be compared, and one of them loaded, in little more memory than one takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError  # only its name: nothing here unpickles but torch's reader of weights
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mtserve.errors import CheckpointError, ConfigError
from mtserve.safetensors_file import read_header

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_FORMS = tuple(form for whole in _WHOLE for form in (whole, f"{whole}.index.json"))


class Stored:
    """All tensors of a folder that Transformers wrote: safetensors or a pickle of tensors, whole or in shards.

    Raises ConfigError where there are none, or for a pickle that is not allowed; CheckpointError for a damaged file.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.files = _files(folder)
        self._pickled: dict[str, Tensor] = {}
        self._of: dict[str, Path] = {}
        for path in self.files:
            if path.suffix == ".safetensors":
                names: Iterable[str] = read_header(path)
            else:
                if not allow_pickle:
                    why = "is a pickle, a form that can run code when it is read"
                    raise ConfigError(
                        f"{path} {why}; --allow-pickle reads it with torch's loader that makes tensors and nothing else"
                    )
                names = loaded = _unpickled(path)
                self._pickled |= loaded
            self._of |= dict.fromkeys(names, path)

    @property
    def names(self) -> list[str]:
        return sorted(self._of)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Views of the mapped files, in the files' own precision."""
        opened: dict[Path, Any] = {}
        found = {}
        for name in names:
            if name in self._pickled:
                found[name] = self._pickled[name]
                continue
            path = self._of[name]
            if path not in opened:
                opened[path] = safe_open(path, framework="pt")
            found[name] = opened[path].get_tensor(name)
        return found

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same type, shape and values."""
        a, b = (self.read([name])[name] for name in (one, other))
        return a.dtype == b.dtype and a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _files(folder: Path) -> list[Path]:
    name = next((form for form in _FORMS if (folder / form).is_file()), None)
    if name is None:
        raise ConfigError(f"{folder} holds no weights; looked for {', '.join(_FORMS)}")
    path = folder / name
    if path.suffix != ".json":
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no index of weight files: {error!r}") from error
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{path} names {shard}, which is no file beside it")
    return [folder / shard for shard in shards]


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} is no file of tensors that torch can map: {first}") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise CheckpointError(f"{path} holds something other than tensors by name")
    return loaded
