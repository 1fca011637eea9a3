"""CSV and TSV with a header line. Values stay the text that they are: no guessed types, no text read as missing."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Literal

from mtserve.errors import ConfigError
from training.readers.lines import read_lines
from training.readers.record import BadRecord, Files, NoOptions, Record, Records


def read_csv(files: Files, options: NoOptions) -> Records:
    """Commas between cells, quotes around those that hold commas, quotes or line ends (RFC 4180)."""
    return _read(files, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def read_tsv(files: Files, options: NoOptions) -> Records:
    """As CSV, with tabs."""
    return _read(files, delimiter="\t", quoting=csv.QUOTE_MINIMAL)


def read_glue_tsv(files: Files, options: NoOptions) -> Records:
    """Tabs between cells and no quoting, as GLUE's files are: a quote is text, and a line a record."""
    return _read(files, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read(files: Files, *, delimiter: str, quoting: Literal[0, 3]) -> Records:
    """Records named by their last line; an empty cell is a missing value.

    Raises ConfigError for a header that is none, and for a quote that is open at the end of the file: it may have
    swallowed any number of records.
    """
    name, damaged, ended = files.path.name, list[str](), False

    def text() -> Iterator[str]:
        nonlocal ended
        for line in read_lines(files.path, files.encoding, ends=True):
            if line.fault:
                damaged.append(line.fault)
            yield line.text
        ended = True

    rows = csv.reader(text(), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    while True:
        first = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            if ended or header is None:
                raise ConfigError(f"{name}:{first} cannot be read: {error}") from error
            cells = []
            damaged.append(f"{error} (the record begins in line {first})")
        if header is None:
            header = _header(name, cells or [], damaged)
        elif cells is None:
            return
        elif damaged:
            yield BadRecord(f"{name}:{rows.line_num}", damaged[0])
            damaged.clear()
        elif len(cells) == len(header):
            data = {column: cell or None for column, cell in zip(header, cells, strict=True)}
            yield Record(f"{name}:{rows.line_num}", data)
        elif cells:
            yield BadRecord(f"{name}:{rows.line_num}", f"{len(cells)} cells; the header has {len(header)}")


def _header(name: str, cells: list[str], damaged: list[str]) -> list[str]:
    if damaged:
        raise ConfigError(f"the header line of {name} is {damaged[0]}")
    if not cells or len(set(cells)) != len(cells):
        raise ConfigError(f"{name} needs a header line of distinct names; found {', '.join(cells)!r}")
    return cells
