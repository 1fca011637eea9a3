"""Rows of answers as the bytes of a part, in each format, and parts as a file. Knows no task and no place."""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from mtserve.errors import ConfigError, MissingExtraError
from mtserve.score.places import Place, compressed

Row = Mapping[str, Any]


class Form(ABC):
    """How rows of one output are written: the same bytes for the same rows, whoever writes them.

    A part is a file of its own; `joined` makes one of several.
    """

    def __init__(self, of: Place) -> None:
        self.of = of

    def misfits(self, rows: Sequence[Row]) -> Mapping[int, str]:
        """Rows, by their place among these, that cannot be written with those before them, and why."""
        return {}

    @abstractmethod
    def part(self, rows: Sequence[Row], *, first: bool) -> bytes:
        """The bytes of a part; `first`: of its file."""

    def joined(self, parts: Iterable[bytes], to: IO[bytes]) -> None:
        """A file of its parts, in order; without any, one without rows."""
        for part in parts:
            to.write(part)


class Lines(Form):
    """A JSON object a line."""

    def part(self, rows: Sequence[Row], *, first: bool) -> bytes:
        text = "".join(as_json(row) + "\n" for row in rows)
        return compressed(text.encode("utf-8", "backslashreplace"), self.of.compression)


class Cells(Form):
    """A header and a line a row; what is no text and no number is JSON."""

    def __init__(self, of: Place, names: Sequence[str]) -> None:
        super().__init__(of)
        self.names = names

    def misfits(self, rows: Sequence[Row]) -> Mapping[int, str]:
        return _strangers(rows, self.names)

    def part(self, rows: Sequence[Row], *, first: bool) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if self.of.format == "tsv" else ",", lineterminator="\n")
        if first:
            writer.writerow(self.names)
        writer.writerows([_cell(row.get(name)) for name in self.names] for row in rows)
        return compressed(text.getvalue().encode("utf-8", "backslashreplace"), self.of.compression)


class Tables(Form):
    """Parquet or Arrow."""

    def __init__(self, of: Place, schema: bytes) -> None:
        super().__init__(of)
        self._tables = _tables()
        self.schema = self._tables.read_schema(schema)

    def misfits(self, rows: Sequence[Row]) -> Mapping[int, str]:
        found = _strangers(rows, self.schema.names)
        if self._refused(rows):
            for at, row in enumerate(rows):
                if at not in found and (error := self._refused([row])):
                    found[at] = f"a cell is not of its column's type in the first rows: {error}"
        return found

    def _refused(self, rows: Sequence[Row]) -> Exception | None:
        try:
            self._tables.batch(rows, self.schema)
        except Exception as error:  # pyarrow's, of several classes
            return error
        return None

    def part(self, rows: Sequence[Row], *, first: bool) -> bytes:
        content: bytes = self._tables.written([self._tables.batch(rows, self.schema)], self.schema, self.of.format)
        return content

    def joined(self, parts: Iterable[bytes], to: IO[bytes]) -> None:
        each = (batch for part in parts for batch in self._tables.read_part(part, self.of.format))
        self._tables.write(to, each, self.schema, self.of.format)


def schema_of(first: Sequence[Row], added: Mapping[str, Any], *, known: Any = None) -> bytes:
    """Arrow's schema of an output, serialised: columns of the input as in `known` (a schema), else by its first rows,
    then those that are added."""
    tables = _tables()
    kept = [{name: value for name, value in row.items() if name not in added} for row in first]
    return bytes(tables.extended(tables.inferred(kept) if known is None else known, added).serialize())


def names_of(first: Sequence[Row], added: Mapping[str, Any]) -> list[str]:
    """Columns of an output of lines with a header."""
    return [*dict.fromkeys(name for row in first for name in row if name not in added), *added]


def _tables() -> Any:
    try:
        from mtserve.score import tables
    except ImportError as error:
        raise MissingExtraError("Parquet and Arrow", "score") from error
    return tables


def _strangers(rows: Sequence[Row], names: Sequence[str]) -> dict[int, str]:
    """Rows with a column that the output has not."""
    known, found = frozenset(names), {}
    for at, row in enumerate(rows):
        if unknown := [name for name in row if name not in known]:
            found[at] = f"the output has no column {unknown[0]}, as the first rows of the input had none"
    return found


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(value)
    return as_json(value)


def as_json(value: Any) -> str:
    """With null for numbers that JSON has not, and as text what it has not at all."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def form_of(of: Place, plan: Mapping[str, Any]) -> Form:
    """The form of an output whose columns are planned: `names` of one with a header, `schema` of a table."""
    if of.format == "jsonl":
        return Lines(of)
    if of.format in ("csv", "tsv"):
        return Cells(of, plan["names"])
    if of.url == "-":
        raise ConfigError(f"{of.format} cannot be written to a pipe; allowed: jsonl, csv, tsv")
    return Tables(of, bytes.fromhex(plan["schema"]))
