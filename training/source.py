"""Where records are: a file or a data set as the run file names it, its records and its fingerprint. Knows no kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, model_validator

from mtserve.checkpoint import sha256_file
from mtserve.errors import ConfigError
from training.readers import BadRecord, Record, read_delimited, read_hub, read_jsonl, read_parquet
from training.section import Section

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


class Source(Section):
    """Where records are: a file beside the run file (`path`), or a data set (`hub`: a hub name, or its folder)."""

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.path is not None:
            extra = [name for name in ("config", "split", "revision") if getattr(self, name) is not None]
            if extra:
                raise ValueError(f"{extra[0]} goes with hub, not with path")
            if Path(self.path).suffix not in SUFFIXES:
                raise ValueError(f"{self.path!r} has no known format; allowed: {', '.join(SUFFIXES)}")
        elif self.split is None:
            raise ValueError("a hub data set needs a split")
        return self

    @property
    def shown(self) -> str:
        """The source in a few words, for people."""
        return self.path or "/".join(part for part in (self.hub, self.config, self.split) if part is not None)


def read(source: Source, base: Path) -> Iterator[Record | BadRecord]:
    """The records of a source in its order; `base` is what relative paths are relative to. Raises ConfigError."""
    if source.path is None:
        assert source.hub is not None
        which = {"config": source.config, "split": source.split, "revision": source.revision}
        return read_hub(source.hub, base=base, shown=source.shown, **which)
    path = base / source.path
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is no file")
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    return read_delimited(path, delimiter="\t" if path.suffix == ".tsv" else ",")


def fingerprint(source: Source, base: Path) -> str:
    """sha256 of the source's file; of a data set, of its records as JSON lines."""
    if source.path is not None:
        return sha256_file(base / source.path)
    digest = hashlib.sha256()
    for record in read(source, base):
        assert isinstance(record, Record)
        digest.update(json.dumps(record.data, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
