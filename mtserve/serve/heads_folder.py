"""The folder of heads that came to a server, and of tasks that left it, so that they are so after a start. No torch.

    heads.json                  {"format": 1, "heads": {TASK: FILE, or null for a task of the checkpoints that left}}
    TASK-<hash>.safetensors     heads as they were sent (`mtserve.head_file`)

Invariants (tests/serve/test_heads_folder.py holds them):
1. A head's file has its hash in its name and never changes; `heads.json` is replaced at once, and is the only commit: a
   crash at any moment leaves what was before or what is to be.
2. Files of heads that `heads.json` does not name are removed after the commit.
3. Changes by several servers that have one folder are made one after another (flock), and none undoes another's.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtserve.checkpoint import sha256_file
from mtserve.errors import ConfigError
from mtserve.folder import replace, sync
from mtserve.manifest import check_task_name

FORMAT = 1
INDEX = "heads.json"
_LOCK = ".lock"


def version_of(file: Path) -> str:
    """What tells a head's file from others."""
    return sha256_file(file)[:16]


class HeadsFolder:
    """Raises ConfigError where the folder cannot be made or written, or holds another index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self.read()
        except OSError as error:
            raise ConfigError(f"MTSERVE_HEADS: {path} cannot be written: {error}") from error

    @classmethod
    def private(cls, home: str | None) -> HeadsFolder:
        """One that goes with the server: in its own folder, or where it has none, in a new one."""
        made = cls(Path(home) / "heads" if home else Path(tempfile.mkdtemp(prefix="mtserve-heads-")))
        if not home:
            weakref.finalize(made, shutil.rmtree, made.path, ignore_errors=True)
        return made

    def read(self) -> dict[str, Path | None]:
        """The files of heads by task; None of a task that left. Raises ConfigError."""
        path = self.path / INDEX
        if not path.exists():
            return {}
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']!r}; this version reads format {FORMAT}")
            return {check_task_name(name): self._file(file) for name, file in raw["heads"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"MTSERVE_HEADS: {path} cannot be read: {error}") from error

    def put(self, name: str, source: Path) -> None:
        """Commit a head's file, which is copied."""
        file = self.path / f"{name}-{version_of(source)}.safetensors"
        with self._locked():
            if not file.exists():
                aside = self.path / ".coming"
                shutil.copyfile(source, aside)
                sync(aside)
                aside.replace(file)
            self._commit({**self.read(), name: file})

    def remove(self, name: str, *, of_checkpoint: bool) -> None:
        """Commit that a task has left: one of the checkpoints' is remembered as gone, another one forgotten."""
        with self._locked():
            heads = {other: file for other, file in self.read().items() if other != name}
            self._commit({**heads, name: None} if of_checkpoint else heads)

    def _commit(self, heads: Mapping[str, Path | None]) -> None:
        content = {name: None if file is None else file.name for name, file in heads.items()}
        replace(self.path / INDEX, json.dumps({"format": FORMAT, "heads": content}, indent=1).encode())
        for file in self.path.glob("*.safetensors"):
            if file not in heads.values():
                file.unlink()

    def _file(self, name: Any) -> Path | None:
        if name is None:
            return None
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{name!r} is no file of the folder")
        return self.path / name

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / _LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
