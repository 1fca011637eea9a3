"""Rows as Arrow tables: types of Python as types of Arrow, and rows that do not go with the types of those before."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
from pyarrow import ipc, parquet
from typing_extensions import is_typeddict

from mtserve.score.places import Format

_PLAIN: Mapping[Any, pa.DataType] = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
_GROUP = 65_536


def arrow_type(of: Any) -> pa.DataType:
    """Lists are lists, typed dictionaries and mappings of names to types are structs; what may be anything is text, as
    JSON."""
    if is_typeddict(of):
        of = get_type_hints(of, include_extras=True)
    if isinstance(of, Mapping):
        return pa.struct([pa.field(name, arrow_type(inner)) for name, inner in of.items()])
    if of in _PLAIN:
        return _PLAIN[of]
    origin, inner = get_origin(of), [one for one in get_args(of) if one is not NoneType]
    if origin in (NotRequired, Required) or (origin in (Union, UnionType) and len(inner) == 1):
        return arrow_type(inner[0])
    if origin is Literal:
        return arrow_type(type(inner[0]))
    return pa.list_(arrow_type(inner[0])) if origin in (list, tuple) else pa.string()


def fit(value: Any, of: pa.DataType) -> Any:
    """The value with JSON in the place of what is no text where text is wanted."""
    if value is None:
        return None
    if pa.types.is_struct(of) and isinstance(value, Mapping):
        return {field.name: fit(value.get(field.name), field.type) for field in of}
    if pa.types.is_list(of) and isinstance(value, list | tuple):
        return [fit(one, of.value_type) for one in value]
    if pa.types.is_string(of) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


def inferred(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Types of the cells of some rows, in the order in which their columns come; text where they do not agree or are
    all missing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = []
    for name in names:
        try:
            of = pa.array([row.get(name) for row in rows]).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            of = pa.string()
        found.append(pa.field(name, pa.string() if pa.types.is_null(of) else of))
    return pa.schema(found)


def extended(schema: pa.Schema, added: Mapping[str, Any]) -> pa.Schema:
    """With more columns behind, of types of Python."""
    return pa.schema([*schema, *(pa.field(name, arrow_type(of)) for name, of in added.items())])


def read_schema(serialised: bytes) -> pa.Schema:
    return ipc.read_schema(pa.BufferReader(serialised))


def batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Raises ArrowInvalid, ArrowTypeError or OverflowError where a cell is not of its column's type."""
    columns = [pa.array([fit(row.get(field.name), field.type) for row in rows], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def written(batches: Iterable[pa.RecordBatch], schema: pa.Schema, form: Format) -> bytes:
    """A whole file, the same for equal batches."""
    file = io.BytesIO()
    write(file, batches, schema, form)
    return file.getvalue()


def write(file: Any, batches: Iterable[pa.RecordBatch], schema: pa.Schema, form: Format) -> None:
    """A file of the batches, put together to larger ones."""
    with _writer(file, schema, form) as writer:
        waiting: list[pa.RecordBatch] = []
        for one in batches:
            waiting.append(one)
            if sum(each.num_rows for each in waiting) >= _GROUP:
                writer.write_table(pa.Table.from_batches(waiting, schema))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema))


def read_part(content: bytes, form: Format) -> Iterable[pa.RecordBatch]:
    """The batches of a file that `written` made."""
    if form == "parquet":
        return list(parquet.ParquetFile(io.BytesIO(content)).iter_batches(_GROUP))
    reader = ipc.open_file(pa.BufferReader(content))
    return [reader.get_batch(at) for at in range(reader.num_record_batches)]


def _writer(file: Any, schema: pa.Schema, form: Format) -> Any:
    if form == "parquet":
        return parquet.ParquetWriter(file, schema, compression="zstd")
    return ipc.new_file(file, schema, options=ipc.IpcWriteOptions(compression="zstd"))
