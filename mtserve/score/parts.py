"""The journal of a run: parts that are committed one by one, and are put together in the end. Knows bytes, no rows.

OUTPUT.parts/  run.json                  what is scored, with what and how: the key of the run
               lock                      held by the run, on a local file system
               SHARD-PART.json           receipt of a part, written after all its files
               SHARD-PART.data …         its files

Invariants (tests/score/test_parts.py holds them):

1.  A part is there or not: its receipt is put in place at once, after its files were written and synced. What has no
    receipt is written anew.
2.  A folder is only gone on with by a run of the same key; another one is refused, with what differs.
3.  Two runs never write into one folder (on a local file system; object stores have no locks).
4.  The output appears at once and whole, by a rename on a local file system and as one object elsewhere; the folder of
    parts goes after that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mtserve.errors import ConfigError, SetupError
from mtserve.folder import replace, sync
from mtserve.score.places import file_system, is_local

RUN = "run.json"


class OutputError(SetupError):
    """What was scored cannot be written: a full disk, a folder that may not be written into."""

    code = "output_failed"


@dataclass(frozen=True)
class Receipt:
    """Of one part: where it begins in its file and how many rows it has, what they cost, and its files' sha256.

    last     no row follows it in its file
    counts   sums over its rows
    """

    shard: int
    part: int
    start: int
    rows: int
    last: bool
    counts: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.shard:05d}-{self.part:06d}"


class Parts:
    """The folder of a run's parts, on whatever file system the output is."""

    def __init__(self, output: str) -> None:
        self.url = output.rstrip("/") + ".parts"
        self._system, self.path = file_system(self.url)
        self.local = is_local(self._system)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else is in the folder. Raises ConfigError if somebody is."""
        if not self.local:
            yield
            return
        with _writing(self.url):
            Path(self.path).mkdir(parents=True, exist_ok=True)
        with (Path(self.path) / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"another run writes {self.url}: wait for it, or choose another output") from error
            yield

    def begin(self, key: Mapping[str, Any], *, restart: bool) -> None:
        """Begin the run, or go on with it. Raises ConfigError for a folder of another."""
        if restart:
            self._empty()
        found = self.read_run()
        if found is None:
            self._empty()  # of what was written before a key was
            self._put(RUN, json.dumps(key, ensure_ascii=False, indent=1).encode())
            return
        if differs := [*_differing(found, json.loads(json.dumps(key)), "")]:
            said = "; ".join(differs[:5])
            raise ConfigError(f"{self.url} holds parts of another run ({said}); --restart scores all of it anew")

    def read_run(self) -> Mapping[str, Any] | None:
        content = self._get(RUN)
        return None if content is None else json.loads(content)

    def receipts(self) -> dict[tuple[int, int], Receipt]:
        """All that are there, by shard and part."""
        with suppress(FileNotFoundError):
            names = sorted(path.rsplit("/", 1)[-1] for path in self._system.ls(self.path, detail=False))
            mine = [name for name in names if name.endswith(".json") and name != RUN]
            found = [Receipt(**json.loads(self._get(name) or b"{}")) for name in mine]
            return {(one.shard, one.part): one for one in found}
        return {}

    def commit(self, receipt: Receipt, files: Mapping[str, bytes]) -> Receipt:
        """Write a part's files, by their endings, then its receipt. Raises OutputError."""
        sums = {}
        for ending, content in files.items():
            self._put(f"{receipt.name}.{ending}", content)
            sums[ending] = hashlib.sha256(content).hexdigest()
        done = Receipt(**{**asdict(receipt), "files": sums})
        self._put(f"{done.name}.json", json.dumps(asdict(done)).encode())
        return done

    def read(self, receipt: Receipt, ending: str) -> bytes | None:
        """A file of a part, None if it has none of that ending. Raises SetupError for one that is not as it was
        committed; its receipt is gone then, so that the next run makes it anew."""
        if ending not in receipt.files:
            return None
        name = f"{receipt.name}.{ending}"
        content = self._get(name)
        if content is None or hashlib.sha256(content).hexdigest() != receipt.files[ending]:
            self._remove(f"{receipt.name}.json")
            raise SetupError(f"{self.url}/{name} is not as it was written; run the command again to make it anew")
        return content

    @contextmanager
    def output(self, url: str) -> Iterator[IO[bytes]]:
        """A file to write into, which appears under its name at once when all is written. Raises OutputError."""
        with _writing(url), self._aside(url) as file:
            yield file

    @contextmanager
    def _aside(self, url: str) -> Iterator[IO[bytes]]:
        system, path = file_system(url)
        if not is_local(system):
            with tempfile.TemporaryFile() as aside:
                yield aside
                aside.seek(0)
                system.pipe_file(path, aside.read())
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        waiting = target.with_name(f".{target.name}.aside")
        with waiting.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(waiting, target)
        sync(target.parent)

    def remove(self) -> None:
        """The folder goes; what names it goes first, so that a run that is broken off here leaves no run."""
        self._remove(RUN)
        self._system.rm(self.path, recursive=True)

    def _empty(self) -> None:
        self._remove(RUN)
        with suppress(FileNotFoundError):
            for path in self._system.ls(self.path, detail=False):
                if not path.endswith("/lock"):
                    self._system.rm(path, recursive=True)

    def _put(self, name: str, content: bytes) -> None:
        with _writing(self.url):
            if self.local:
                replace(Path(self.path) / name, content)
            else:
                self._system.pipe_file(f"{self.path}/{name}", content)

    def _get(self, name: str) -> bytes | None:
        try:
            return bytes(self._system.cat_file(f"{self.path}/{name}"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self.path}/{name}")


@contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(
            f"{url} cannot be written ({why}); what was scored is kept, the same command goes on"
        ) from error


def _differing(one: Any, other: Any, where: str) -> Iterator[str]:
    """Where two keys differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from _differing(one.get(name), other.get(name), f"{where}.{name}" if where else name)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for at, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _differing(left, right, f"{where}[{at}]")
    elif one != other:
        left, right = (json.dumps(value, ensure_ascii=False) for value in (one, other))
        yield f"{where}: {left:.80} there, {right:.80} now"
