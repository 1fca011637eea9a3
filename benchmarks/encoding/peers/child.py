"""The process in which a peer runs: loaded once, then asked in JSON lines; it times itself. Knows no engine by import.

    PYTHON -m benchmarks.encoding.peers.child      (requests on standard input, answers on standard output)

load     engine, folder, threads, options -> versions
inputs   name, path -> count           what is to be encoded: an .npz of rows, or a .json of texts
tune     name, settings -> seconds     of each setting, its best pass; the fastest stays
run      name, calls -> seconds        of each call; with them MiB by which resident memory rose above where it began
save     path                          the embeddings that the last call made
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats, Row

_TUNE_S = 0.3
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Child:
    """One peer with its inputs."""

    def __init__(self) -> None:
        self._peer: Peer
        self._inputs: dict[str, Any] = {}
        self._made: Floats

    def answer(self, do: str, **request: Any) -> dict[str, Any]:
        """One request; an error becomes an answer, so that a peer that cannot is reported and the others go on."""
        method: Callable[..., dict[str, Any]] = getattr(self, do)
        try:
            return method(**request)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}

    def load(self, *, engine: str, folder: str, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        module = importlib.import_module(f"benchmarks.encoding.peers.{engine}")
        self._peer = module.open_peer(Path(folder), threads=threads, **options)
        return {"versions": self._peer.versions}

    def inputs(self, *, name: str, path: str) -> dict[str, Any]:
        found = read_inputs(Path(path))
        self._inputs[name] = self._peer.prepare(found)
        return {"count": len(found)}

    def tune(self, *, name: str, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found: list[float] = []
        for setting in settings:
            self._peer.use(setting)
            found.append(self._best(name) if len(settings) > 1 else self._timed(name))
        self._peer.use(settings[found.index(min(found))])
        return {"seconds": found}

    def run(self, *, name: str, calls: int) -> dict[str, Any]:
        before = _resident_mib(reset=True)
        seconds = [self._timed(name) for _ in range(calls)]
        return {"seconds": seconds, "grown_mib": _resident_mib() - before}

    def save(self, *, path: str) -> dict[str, Any]:
        np.save(path, self._made)
        return {}

    def _best(self, name: str) -> float:
        """Seconds of the best of three passes, or of more where they are short."""
        found: list[float] = []
        while len(found) < 3 or sum(found) < _TUNE_S:
            found.append(self._timed(name))
        return min(found)

    def _timed(self, name: str) -> float:
        inputs = self._inputs[name]
        started = time.perf_counter()
        self._made = self._peer.encode(inputs)
        return time.perf_counter() - started


def read_inputs(path: Path) -> list[Row] | list[str]:
    if path.suffix == ".json":
        texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return texts
    with np.load(path) as found:
        ends = np.cumsum(found["lengths"])[:-1]
        pairs = zip(np.split(found["ids"], ends), np.split(found["types"], ends), strict=True)
        return [(ids.copy(), types.copy()) for ids, types in pairs]


def write_rows(path: Path, rows: Sequence[tuple[Any, Any]]) -> None:
    """Ids and type ids of each row, of any kind of integers."""
    ids, types = (np.concatenate([row[part] for row in rows]).astype(np.int64) for part in (0, 1))
    np.savez(path, ids=ids, types=types, lengths=[len(row[0]) for row in rows])


def _resident_mib(*, reset: bool = False) -> float:
    """The most that was resident since the last reset, in MiB; right after one, what is now (Linux)."""
    try:
        if reset:
            _CLEAR.write_text("5", encoding="ascii")
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux, or not allowed
        return math.nan
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    child = Child()
    for line in sys.stdin:
        out.write(json.dumps(child.answer(**json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
