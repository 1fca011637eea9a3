"""Where records are: files or a data set as the run file names them, and their fingerprint. Knows no kind of task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mtserve.checkpoint import sha256_file
from mtserve.errors import ConfigError, InputError
from mtserve.tasks.validation import validate
from training.readers import FORMATS, Files, Format, NoOptions, Record, Records, canonical, converted, read_hub
from training.section import Section

SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}


class Source(Section):
    """Where records are: a file or folder beside the run file (`path`), or a data set (`hub`: its name or folder).

    `format` is by default what the path's suffix says; `options` are the format's own; `encoding` is that of text.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    format: str | None = None
    options: dict[str, Any] = Field(default={})
    encoding: str | None = None
    columns: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}; allowed: {', '.join(FORMATS)}")
        if self.path is not None and self.rules is None:
            allowed = f"{', '.join(SUFFIXES)}, or format: {', '.join(FORMATS)}"
            raise ValueError(f"{self.path!r} has no known format; allowed: {allowed}")
        if self.hub is not None and self.rules is not None and self.rules.convert is None:
            allowed = ", ".join(name for name, rules in FORMATS.items() if rules.convert is not None)
            raise ValueError(f"format {self.format} is of files; allowed with hub: {allowed}")
        return self

    @model_validator(mode="after")
    def _keys_fit(self) -> Source:
        layout = self.rules is not None and self.rules.layout is not None
        wrong = [] if self.hub is not None else ["config", "revision", *([] if layout else ["split"])]
        extra = [name for name in wrong if getattr(self, name) is not None]
        if extra:
            raise ValueError(f"{extra[0]} goes with hub, not with path")
        if self.split is None and (self.hub is not None or layout):
            raise ValueError(f"{f'format {self.format}' if layout else 'a hub data set'} needs a split")
        if self.encoding is not None:
            if self.hub is not None or self.rules is None or not self.rules.encoded:
                raise ValueError(f"encoding goes with text files; {self.shown} states its own")
            canonical(self.encoding)
        self.checked_options()
        return self

    @property
    def rules(self) -> Format | None:
        """The format of the files, or of a data set's rows where they need one."""
        return FORMATS.get(self.format_name)

    @property
    def format_name(self) -> str:
        """What is given, or what the path's suffix says; empty where neither says anything."""
        return self.format or SUFFIXES.get(Path(self.path or "").suffix, "")

    @property
    def shown(self) -> str:
        """The source in a few words, for people."""
        return "/".join(part for part in (self.path or self.hub, self.config, self.split) if part is not None)

    def checked_options(self) -> Section:
        """The options under the format's schema, with its defaults. Raises ValueError."""
        try:
            return validate(NoOptions if self.rules is None else self.rules.options, self.options)
        except InputError as error:
            raise ValueError(f"options of {self.format_name or self.shown}: {error}") from error


def read(source: Source, base: Path) -> Records:
    """The records of a source in its order; `base` is what relative paths are relative to. Raises ConfigError."""
    rules = source.rules
    if source.hub is not None:
        rows = _hub(source, base)
        return rows if rules is None or rules.convert is None else converted(rows, rules.convert)
    assert rules is not None
    return rules.read(Files(_paths(source, base), source.encoding or "utf-8"), source.checked_options())


def fingerprint(source: Source, base: Path) -> str:
    """sha256 of how the source is read and of its files; of a data set, of its rows. Raises ConfigError."""
    options, encoding = source.checked_options().model_dump(mode="json"), canonical(source.encoding or "utf-8")
    how = [source.format_name, options, source.split, encoding]
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    if source.hub is not None:
        for row in _hub(source, base):
            digest.update(json.dumps(row.data, sort_keys=True, default=str).encode() + b"\n")
    else:
        for path in _paths(source, base):
            try:
                digest.update(bytes.fromhex(sha256_file(path)))
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _hub(source: Source, base: Path) -> Iterator[Record]:
    assert source.hub is not None
    which = {"config": source.config, "split": source.split, "revision": source.revision}
    return read_hub(source.hub, base=base, shown=source.shown, **which)


def _paths(source: Source, base: Path) -> tuple[Path, ...]:
    assert source.path is not None
    assert source.rules is not None
    layout, place = source.rules.layout, base / source.path
    paths = (place,) if layout is None else layout(place, source.split or "", source.checked_options())
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist or is no file")
    return paths
