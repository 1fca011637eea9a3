"""One record as it was read, or why it could not be, and what a reader is given. Knows no format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.section import Section


@dataclass(frozen=True)
class Record:
    """Columns and values; `where` is the file and line, or the data set and row, from 1.

    A column `repairs`, where a format has one, lists by type what the reader changed or left out to make the record.
    """

    where: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class BadRecord:
    """A place that holds no record, and why."""

    where: str
    message: str


Records = Iterator[Record | BadRecord]
Convert = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Files:
    """What a reader is given: its format's files, all there, and the encoding of those that are text."""

    paths: tuple[Path, ...]
    encoding: str = "utf-8"

    @property
    def path(self) -> Path:
        """The file, of a format that reads one."""
        return self.paths[0]


class NoOptions(Section):
    """The options of a format that has none."""


@dataclass(frozen=True)
class Format:
    """How one format is read; `read` raises ConfigError for what makes the whole source useless, and nothing else.

    read       files and options -> records
    options    the schema of the source's `options`
    layout     folder, split and options -> the files of a format that is a folder of several
    convert    raw columns -> the format's columns, for rows of a hub data set; raises ValueError
    encoded    whether the source may name an encoding; files of the others state their own
    """

    read: Callable[[Files, Any], Records]
    options: type[Section] = NoOptions
    layout: Callable[[Path, str, Any], tuple[Path, ...]] | None = None
    convert: Convert | None = None
    encoded: bool = True


def converted(records: Iterable[Record | BadRecord], convert: Convert) -> Records:
    """The records in a format's own columns; those that cannot be converted are bad."""
    for record in records:
        try:
            yield record if isinstance(record, BadRecord) else Record(record.where, convert(record.data))
        except ValueError as error:
            yield BadRecord(record.where, str(error))
