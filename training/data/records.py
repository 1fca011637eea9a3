"""Records of a source under a kind's schema, as an Arrow table on disk that is read once. Knows no options, no tokens.

The table is a `datasets.Dataset` file in the library's cache, named by a fingerprint of the data, the kind, how it is
read, and this package's own code. Invariant: every record is either a usable row or counted as left out with its place.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import datasets
from datasets import Features, List, Value
from datasets.exceptions import DatasetGenerationError
from pydantic import BaseModel

import mtserve
import training
from mtserve.errors import ConfigError, InputError
from mtserve.tasks.base import AnyKind
from mtserve.tasks.validation import validate
from training.data.source import Source, fingerprint, read
from training.readers import BadRecord, Record

Policy = Literal["stop", "skip"]
NOTES = {**dict.fromkeys(("_where", "_error", "_group"), Value("string")), "_repairs": List(Value("string"))}
_LIBRARIES = ("datasets", "tokenizers", "snowballstemmer", "farasapy")
_CODE = (
    (mtserve, ("text.py", "rows.py", "preparation*", "tasks")),
    (training, ("readers", "data", "pretraining.py")),
)


@dataclass
class BadRecords:
    """What happens to records that cannot be used: the first stops the run, or all are counted and left out."""

    policy: Policy
    messages: list[str] = field(default_factory=list)

    def add(self, where: str, message: str) -> None:
        """Raises ConfigError under `stop`."""
        if self.policy == "stop":
            raise ConfigError(f"{where}: {message} (on_bad_record: skip would leave such records out)")
        self.messages.append(f"{where}: {message}")


@dataclass(frozen=True)
class Records:
    """The records of one source under a kind's schema: usable ones in `table`, the others counted in `bad`.

    sha256   of the source
    mark     names the table: of all that made it
    """

    table: datasets.Dataset
    bad: BadRecords
    sha256: str
    mark: str

    def some(self, indexes: Sequence[int]) -> Records:
        """A part of the records; the bad ones stay with the whole."""
        rest = BadRecords(self.bad.policy)
        return Records(self.table.select(indexes), rest, self.sha256, mark("some", self.mark, list(indexes)))


def read_records(
    kind: AnyKind,
    source: Source,
    *,
    base: Path,
    policy: Policy,
    plural: bool = False,
    group: str | None = None,
    limit: int | None = None,
) -> Records:
    """Read a source once. `plural` takes lists where a kind's field may be one value or several; `group` is the column
    that says which records belong together; of the source only the first `limit` records count.

    Raises ConfigError under `stop`.
    """
    sha256 = fingerprint(source, base)
    name = mark("records", kind.name, source.model_dump(mode="json"), sha256, plural, group, limit)
    columns = {name: _type(info.annotation, plural=plural) for name, info in kind.labelled.model_fields.items()}

    def rows() -> Iterator[dict[str, Any]]:
        for record in islice(read(source, base), limit):
            blank = {**dict.fromkeys([*columns, *NOTES]), "_where": record.where}
            try:
                yield {**blank, **_cells(kind, record, source.columns, columns, group)}
            except InputError as error:
                yield {**blank, "_error": str(error)}

    with making():
        table = datasets.Dataset.from_generator(
            rows, features=Features({**columns, **NOTES}), cache_dir=str(_cache()), fingerprint=name
        )
    bad, kept = sorted_out(table, policy)
    return Records(table if len(kept) == len(table) else table.select(kept), bad, sha256, name)


@contextmanager
def making() -> Iterator[None]:
    """A table is made here, quietly. Raises ConfigError for what a reader says, and where no table can be written."""
    try:
        with quiet():
            yield
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error  # it wraps what was raised
        if isinstance(cause, ConfigError):
            raise cause from error
        if isinstance(cause, OSError):
            found = f"{_cache()} cannot hold the tables of this run: {cause.strerror or cause}"
            raise ConfigError(f"{found}; allowed: HF_DATASETS_CACHE=FOLDER, another one") from error
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, unless somebody watches."""
    shown = not (sys.stderr.isatty() or datasets.are_progress_bars_disabled())
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def sorted_out(table: datasets.Dataset, policy: Policy) -> tuple[BadRecords, list[int]]:
    """What was left out, and the indexes of the rows that were not."""
    bad, kept = BadRecords(policy), []
    errors = table["_error"]
    for index, error in enumerate(errors):
        if error is None:
            kept.append(index)
        else:
            bad.add(table[index]["_where"], error)
    return bad, kept


def _cells(
    kind: AnyKind, record: Record | BadRecord, columns: Mapping[str, str], types: Mapping[str, Any], group: str | None
) -> dict[str, Any]:
    """The fields of a record's labelled example as plain data. Raises InputError."""
    if isinstance(record, BadRecord):
        raise InputError(record.message)
    example = validate(kind.labelled, _fields(record, kind.labelled.model_fields, columns))
    cells = example.model_dump()
    for name, value in cells.items():
        if isinstance(value, tuple) and not isinstance(types[name], List):
            if len(value) != 1:
                raise InputError(f"{name}: one {name} is wanted, found {len(value)}")
            cells[name] = value[0]
        elif isinstance(types[name], List) and isinstance(value, str):
            cells[name] = [value]
    if group is not None:
        if record.data.get(group) is None:
            raise InputError(f"no column {group!r} to group by; it has {', '.join(record.data)}")
        cells["_group"] = str(record.data[group])
    return {**cells, "_repairs": list(record.data.get("repairs") or ())}


def _fields(record: Record, names: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The example's fields from a record's columns; a dotted column looks into an object. Missing values are left out.

    Raises InputError for a column that the map names and the record lacks.
    """
    found: dict[str, Any] = {}
    for name in names:
        value: Any = record.data
        column = columns.get(name, name)
        for part in [column] if column in record.data else column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[name] = value
        elif name in columns and column.split(".")[0] not in record.data:
            raise InputError(f"no column {column!r}; it has {', '.join(record.data)}")
    return found


def _type(annotation: Any, *, plural: bool) -> Any:
    """The Arrow type of a field of a pydantic model. Of "one or several" the several where `plural`."""
    if get_origin(annotation) in (Union, UnionType):
        several = [one for one in get_args(annotation) if get_origin(one) is tuple]
        one = [one for one in get_args(annotation) if one is not type(None) and one not in several]
        return _type((several if (plural and several) or not one else one)[0], plural=plural)
    if get_origin(annotation) is tuple:
        return List(_type(get_args(annotation)[0], plural=plural))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: _type(info.annotation, plural=plural) for name, info in annotation.model_fields.items()}
    return {str: Value("string"), int: Value("int64"), float: Value("float64"), bool: Value("bool")}[annotation]


def mark(*parts: Any) -> str:
    """A name for what these parts and this package's code make."""
    return hashlib.sha256(json.dumps([*parts, _code()], sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """sha256 over the code that makes rows: an older version's tables must not be taken for this one's."""
    digest = hashlib.sha256(json.dumps([d.version for n in _LIBRARIES for d in distributions(name=n)]).encode())
    for package, names in _CODE:
        home = Path(package.__file__ or "").parent
        for path in sorted(path for name in names for path in home.glob(name)):
            for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "mtserve"
