"""Tensors of the Open Inference Protocol (V2, REST, with its extension for binary tensors) to a task's inputs and back.

A task's inputs are the fields of its examples, tensors of BYTES: texts of shape [n]; lists of texts (`words` and
`choices`) of shape [n, k], where empty ones at the end of a row are none, or [n] with a list as JSON in each cell.
Outputs are what a table has of a prediction (`Kind.flat`), and `prediction`: all of it, as JSON, of shape [n]. Pure;
knows no HTTP.

Source: the protocol as KServe publishes it (open-inference-protocol, rest/inference_rest.yaml) and Triton's document of
the binary extension.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from mtserve.engine import Task
from mtserve.errors import InputError, Problem, RequestError

PREDICTION = "prediction"
_TYPES: Mapping[Any, str] = {str: "BYTES", float: "FP64", int: "INT64", bool: "BOOL"}
_NUMBERS: Mapping[str, str] = {"FP64": "<f8", "INT64": "<i8", "BOOL": "?"}
NOT_OF_TASKS = frozenset(
    {
        "binary_data_output",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "priority",
        "timeout",
        "content_type",
        "headers",
    }
)
"""Parameters of a request that are of the protocol or of servers with queues, and say nothing to a task."""


@dataclass(frozen=True)
class Tensor:
    """One of the input or output, as metadata say it."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Asked:
    """A request: items for a task with its parameters, and which outputs are wanted, and whether as binary."""

    items: list[dict[str, Any]]
    parameters: dict[str, Any]
    outputs: Mapping[str, bool]
    id: str | None = None


def inputs_of(task: Task) -> list[Tensor]:
    fields = task.kind.example.model_fields
    return [Tensor(name, "BYTES", (-1, -1) if _is_list(of.annotation) else (-1,)) for name, of in fields.items()]


def outputs_of(task: Task) -> list[Tensor]:
    flat = task.kind.flat_types(task.options)
    found = [Tensor(name, _TYPES.get(of, "BYTES"), (-1,)) for name, of in flat.items() if name != PREDICTION]
    return [*found, Tensor(PREDICTION, "BYTES", (-1,))]


def read_request(body: Mapping[str, Any], binary: bytes, task: Task) -> Asked:
    """A request's JSON and the bytes behind it. Raises RequestError and InputError."""
    known = {tensor.name: tensor for tensor in inputs_of(task)}
    given = _objects(body.get("inputs"), "inputs")
    columns: dict[str, list[Any]] = {}
    rest = memoryview(binary)
    for tensor in given:
        name = tensor.get("name")
        if not isinstance(name, str) or name not in known:
            raise InputError(
                Problem(f"{name!r} is no input of this model; allowed: {', '.join(known)}", field="inputs")
            )
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        if size is not None:
            tensor, rest = {**tensor, "data": _texts(rest[: _size(size, rest)])}, rest[_size(size, rest) :]
        columns[name] = _column(tensor, many=len(known[name].shape) > 1)
    if len(rest):
        raise RequestError(f"{len(rest)} bytes of the body belong to no input")
    lengths = {name: len(cells) for name, cells in columns.items()}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "none"
        raise InputError(Problem(f"inputs must have equally many rows; found: {found}", field="inputs"))
    items = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    parameters = body.get("parameters") or {}
    return Asked(
        items,
        {name: value for name, value in parameters.items() if name not in NOT_OF_TASKS},
        _wanted(body, task, binary=bool(parameters.get("binary_data_output"))),
        body.get("id"),
    )


def write_answer(asked: Asked, task: Task, predictions: Sequence[Any]) -> tuple[dict[str, Any], bytes]:
    """The answer's JSON and the bytes that go behind it, none where nothing is wanted as binary."""
    flat = [task.kind.flat(one, task.options) for one in predictions]
    types = {tensor.name: tensor.datatype for tensor in outputs_of(task)}
    outputs, behind = [], b""
    for name, as_binary in asked.outputs.items():
        values = predictions if name == PREDICTION else [row[name] for row in flat]
        cells = [_cell(value, types[name]) for value in values]
        made: dict[str, Any] = {"name": name, "datatype": types[name], "shape": [len(cells)]}
        if as_binary:
            content = _packed(cells, types[name])
            made["parameters"] = {"binary_data_size": len(content)}
            behind += content
        else:
            made["data"] = cells
        outputs.append(made)
    said = {} if asked.id is None else {"id": asked.id}
    return {"model_name": task.name, "model_version": "1", **said, "outputs": outputs}, behind


def _wanted(body: Mapping[str, Any], task: Task, *, binary: bool) -> dict[str, bool]:
    known = [tensor.name for tensor in outputs_of(task)]
    if not body.get("outputs"):
        return dict.fromkeys(known, binary)
    found = {}
    for one in _objects(body["outputs"], "outputs"):
        if one.get("name") not in known:
            wrong = f"{one.get('name')!r} is no output of this model; allowed: {', '.join(known)}"
            raise InputError(Problem(wrong, field="outputs"))
        found[one["name"]] = bool((one.get("parameters") or {}).get("binary_data", binary))
    return found


def _objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise InputError(Problem("must be a list of tensors, at least one", field=name))
    if not all(isinstance(one.get("parameters"), dict | None) for one in value):
        raise InputError(Problem("parameters of a tensor must be an object", field=name))
    return value


def _column(tensor: Mapping[str, Any], *, many: bool) -> list[Any]:
    """Cells of a tensor: texts, or of a field of several texts lists of them."""
    name, data = tensor["name"], tensor.get("data")
    shape: Any = tensor.get("shape")
    if tensor.get("datatype") != "BYTES":
        raise _wrong(name, f"datatype must be BYTES; found {tensor.get('datatype')!r}")
    sizes = isinstance(shape, list) and all(type(one) is int and one >= 0 for one in shape)
    if not sizes or len(shape) not in (1, 2) or (not many and shape[1:] not in ([], [1])):
        raise _wrong(name, f"shape must be [n]{' or [n, k]' if many else ' or [n, 1]'}; found {shape!r:.60}")
    cells = list(_leaves(data))
    if not isinstance(data, list) or len(cells) != math.prod(shape):
        raise _wrong(name, f"a tensor of shape {shape} has {math.prod(shape)} elements; found {len(cells)}")
    if not all(isinstance(cell, str) for cell in cells):
        raise _wrong(name, "every element must be a string")
    if not many:
        return cells
    if len(shape) == 1:
        return [_listed(cell, name) for cell in cells]
    rows = [cells[at * shape[1] : (at + 1) * shape[1]] for at in range(shape[0])]
    return [row[: max((at for at, cell in enumerate(row, 1) if cell), default=0)] for row in rows]


def _leaves(data: Any) -> Iterator[Any]:
    """Elements of a list, or of a list of rows, row by row; what is nested deeper is an element, and no text."""
    for row in data if isinstance(data, list) else [data]:
        yield from row if isinstance(row, list) else [row]


def _listed(cell: str, name: str) -> list[Any]:
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise _wrong(name, f"with shape [n] every element must be a list as JSON; found {cell!r:.60}")
    return found


def _texts(content: memoryview) -> list[str]:
    """Elements of a binary tensor of BYTES: each its length (4 bytes, little-endian), then itself."""
    found, at = [], 0
    while at < len(content):
        if at + 4 > len(content):
            raise RequestError("a binary tensor ends within the length of an element")
        (length,) = struct.unpack_from("<I", content, at)
        at += 4
        if at + length > len(content):
            raise RequestError("a binary tensor ends within an element")
        try:
            found.append(str(content[at : at + length], "utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"element {len(found)} of a binary tensor is not UTF-8") from error
        at += length
    return found


def _size(size: Any, rest: memoryview) -> int:
    if type(size) is not int or not 0 <= size <= len(rest):
        raise RequestError(f"binary_data_size is {size!r:.40}; {len(rest)} bytes are left of the body")
    return size


def _cell(value: Any, datatype: str) -> Any:
    if datatype != "BYTES":
        return value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _packed(cells: Sequence[Any], datatype: str) -> bytes:
    if datatype in _NUMBERS:
        return np.array(cells, _NUMBERS[datatype]).tobytes()
    every = [cell.encode() for cell in cells]
    return b"".join(struct.pack("<I", len(one)) + one for one in every)


def _is_list(annotation: Any) -> bool:
    return any(getattr(one, "__origin__", one) in (tuple, list) for one in (annotation, *get_args(annotation)))


def _wrong(name: str, message: str) -> InputError:
    return InputError(Problem(message, field=f"inputs.{name}"))
