"""Rows of files, one by one and in order: nothing of a file is held but the piece that is being read.

A row that cannot be read is a row with a problem, with its number, and the next one follows: what cannot be told apart
(a file cut off in its last line, a quote that is never closed, a compressed stream that breaks off) is the last row of
its file, with a problem that says so. Numbers count the rows of one file from 0; empty lines are no rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from mtserve.errors import ConfigError, MissingExtraError, ResolveError
from mtserve.score.places import HUB, Format, Place, opened

_CELL = 2**26
"""Longest line in bytes; a longer one is a row with a problem. Cells of CSV have a limit of the csv module's own."""
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its number in its file, its cells by column, or what is wrong with it."""

    number: int
    cells: Mapping[str, Any]
    problem: str | None = None


def read(of: Place, *, start: int = 0) -> Iterator[Record]:
    """The rows of a file from a number on. Raises ResolveError or ConfigError for a file that is not of its format."""
    if of.url.startswith(HUB):
        yield from _hub(of.url, start)
        return
    with opened(of) as file:
        if of.format == "arrow" or of.format == "parquet":
            yield from _tables(_ARROW[of.format], file, of, start)
        else:
            for record in _LINES[of.format](file, of):
                if record.number >= start:
                    yield record


def _jsonl(file: BinaryIO, of: Place) -> Iterator[Record]:
    number = 0
    for line, problem in _lines(file):
        if problem is None and not line.strip():
            continue
        cells, said = ({}, problem) if problem is not None else _object(line)
        yield Record(number, cells, said)
        number += 1


def _object(line: bytes) -> tuple[Mapping[str, Any], str | None]:
    try:
        found = json.loads(line, parse_constant=_refused)
        if b"\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 at byte {error.start} of the line"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if isinstance(found, str):
        return {"text": found}, None
    return (found, None) if isinstance(found, dict) else ({}, f"not a JSON object: {line[:60]!r}")


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, str | None]]:
    """Lines without their ends, and what is wrong with each."""
    while True:
        try:
            line = file.readline(_CELL)
        except (OSError, EOFError, ValueError) as error:  # of the decompressor
            yield b"", f"the file cannot be read on from here: {error}"
            return
        if not line:
            return
        problem = None
        while len(line) >= _CELL and not line.endswith(b"\n"):
            problem = f"longer than {_CELL} bytes"
            line = file.readline(_CELL)
        yield line.rstrip(b"\r\n"), problem


def _delimited(delimiter: str) -> Callable[[BinaryIO, Place], Iterator[Record]]:
    """Cells stay the text that they are; an empty one is missing."""

    def read_cells(file: BinaryIO, of: Place) -> Iterator[Record]:
        faults: list[str] = []
        quoting: Any = csv.QUOTE_MINIMAL if of.quotes else csv.QUOTE_NONE
        rows = csv.reader(_text(file, faults), delimiter=delimiter, strict=True, quoting=quoting)
        header = _header(rows, of, faults)
        number = 0
        while True:
            began = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                cells = []
                faults.append(f"{error} (the row begins in line {began})")
            if cells is None and not faults:
                return
            if not cells and not faults:
                continue
            found = cells or []
            if not faults and len(found) != len(header):
                faults.append(f"{len(found)} cells; the header has {len(header)} (line {began})")
            problem = faults[0] if faults else None
            values = {} if problem else {name: cell or None for name, cell in zip(header, found, strict=True)}
            yield Record(number, values, problem)
            number += 1
            faults.clear()
            if cells is None:
                return

    return read_cells


def _text(file: BinaryIO, faults: list[str]) -> Iterator[str]:
    for number, (line, problem) in enumerate(_lines(file)):
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as error:
            problem, text = f"not UTF-8 at byte {error.start} of line {number + 1}", line.decode("utf-8", "replace")
        if problem is not None:
            faults.append(problem)
        yield text + "\n"


def _header(rows: Iterator[list[str]], of: Place, faults: list[str]) -> list[str]:
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise ConfigError(f"the header line of {of.url} cannot be read: {error}") from error
    if faults:
        raise ConfigError(f"the header line of {of.url} is {faults[0]}")
    if not header or len(set(header)) != len(header):
        raise ConfigError(f"{of.url} needs a header line of distinct names; found {', '.join(header)!r}")
    return header


def _tables(batches: Callable[[Any, Any], Iterator[Any]], file: BinaryIO, of: Place, start: int) -> Iterator[Record]:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError(f"{of.format} files", "score") from error
    number = 0
    try:
        for batch in batches(pyarrow, file):
            if number + batch.num_rows > start:
                for at, cells in enumerate(batch.to_pylist()):
                    if number + at >= start:
                        yield Record(number + at, cells)
            number += batch.num_rows
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        if number == 0:
            raise ResolveError(f"{of.url} is no {of.format} file that can be read: {error}") from error
        yield Record(number, {}, f"the file cannot be read on from here: {error}")


def _parquet(pyarrow: Any, file: BinaryIO) -> Iterator[Any]:
    from pyarrow import parquet

    return iter(parquet.ParquetFile(file).iter_batches(batch_size=_BATCH))


def _arrow(pyarrow: Any, file: BinaryIO) -> Iterator[Any]:
    """Of a file or a stream, as Arrow calls its two forms."""
    from pyarrow import ipc

    begins = file.read(6)
    file.seek(0)
    if begins != b"ARROW1":
        yield from ipc.open_stream(file)
        return
    reader = ipc.open_file(file)
    for at in range(reader.num_record_batches):
        yield reader.get_batch(at)


def _hub(location: str, start: int) -> Iterator[Record]:
    """Rows of a data set of the hub, `hub:OWNER/NAME[/CONFIG]/SPLIT`, as they come over the network."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("data sets of the hub", "train") from error
    name, config, split = hub_parts(location)
    rows = datasets.load_dataset(name, config, split=split, streaming=True)
    for number, cells in enumerate(rows.skip(start) if start else rows):
        yield Record(number + start, cells)


def schema(of: Place, keep: Sequence[str] | None) -> Any:
    """Arrow's schema of a table's columns that are kept, None for a file that has none."""
    if of.format not in ("parquet", "arrow"):
        return None
    from pyarrow import ipc, parquet
    from pyarrow import schema as made

    with opened(of) as file:
        if of.format == "parquet":
            found = parquet.read_schema(file)
        else:
            found = next((batch.schema for batch in _arrow(None, file)), None) or ipc.open_stream(file).schema
    return made([field for field in found if keep is None or field.name in keep])


def total(of: Place, lines: int | None) -> int | None:
    """How many rows a file has, where that is known before it is read; with text in several lines rather fewer."""
    if of.format == "parquet":
        from pyarrow import parquet

        with opened(of) as file:
            return int(parquet.ParquetFile(file).metadata.num_rows)
    return lines if lines is None or of.format == "jsonl" else max(lines - 1, 0)


def hub_parts(location: str) -> tuple[str, str | None, str]:
    """Name, config and split. Raises ConfigError."""
    parts = location.removeprefix(HUB).strip("/").split("/")
    if len(parts) not in (3, 4) or not all(parts):
        raise ConfigError(f"{location}: allowed is hub:OWNER/NAME/SPLIT or hub:OWNER/NAME/CONFIG/SPLIT")
    return "/".join(parts[:2]), parts[2] if len(parts) == 4 else None, parts[-1]


_LINES: Mapping[Format, Callable[[BinaryIO, Place], Iterator[Record]]] = {
    "jsonl": _jsonl,
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
}
_ARROW: Mapping[Format, Callable[[Any, Any], Iterator[Any]]] = {"parquet": _parquet, "arrow": _arrow}
