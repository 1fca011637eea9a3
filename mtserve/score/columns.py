"""Which column of a row is which field of a task's example. Knows rows and kinds, and no files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtserve.errors import ConfigError, InputError, Problem
from mtserve.tasks.base import AnyKind

KNOWN: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "premise"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "words": ("words", "tokens"),
    "label": ("label", "labels"),
    "tags": ("tags", "ner_tags"),
}
"""Columns that a field is read from without being told, the first that is there; others from one of their own name."""
_EITHER = ("text", "words")
"""Fields of which an example has one, the first that is there."""
_LISTS = ("words", "choices", "tags", "spans")


@dataclass(frozen=True)
class Columns:
    """Columns of one task.

    given   field -> a column, or several for a field of several texts; a dot goes into a column of objects, and a list
            of objects gives a list
    """

    kind: AnyKind
    given: Mapping[str, str | tuple[str, ...]]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.given) - set(self.kind.labelled.model_fields)):
            allowed = ", ".join(self.kind.labelled.model_fields)
            raise ConfigError(f"{self.kind.name} has no {unknown[0]} that a column could be; allowed: {allowed}")

    def item(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        """What the row gives an example, unchecked. Raises InputError for a column that is not there."""
        found = self._fields(self.kind.example.model_fields, cells)
        if set(_EITHER) <= set(found):
            found.pop(next((one for one in reversed(_EITHER) if one not in self.given), _EITHER[-1]))
        return found

    def labelled(self, item: Mapping[str, Any], cells: Mapping[str, Any]) -> dict[str, Any]:
        """The same with its truth. Raises InputError for a column that is not there."""
        return {**item, **self._fields(self._truth, cells)}

    @property
    def _truth(self) -> list[str]:
        return [name for name in self.kind.labelled.model_fields if name not in self.kind.example.model_fields]

    def check(self, names: Sequence[str], task: str, *, labels: bool) -> None:
        """Raise ConfigError if rows of these columns, which all rows have, can be no example of the task."""
        cells = dict.fromkeys(names, "x")
        try:
            found = self._fields(self.kind.example.model_fields, cells, deep=False)
            truth = self.labelled({}, cells) if labels else {"": None}
        except InputError as error:
            raise ConfigError(f"task {task!r}: {error}") from None
        needed = [name for name, field in self.kind.example.model_fields.items() if field.is_required()]
        missing = [name for name in needed if name not in found] or ([] if found else [*self.kind.example.model_fields])
        missing += [] if truth else self._truth
        if missing:
            said = f"no column for {missing[0]}; the input has {', '.join(names)}"
            raise ConfigError(f"task {task!r}: {said}; name one: {missing[0]}=COLUMN")

    def _fields(self, names: Iterable[str], cells: Mapping[str, Any], *, deep: bool = True) -> dict[str, Any]:
        found = {}
        for name in names:
            value = self._value(name, cells, deep=deep)
            if value is not None:
                found[name] = value
        return found

    def _value(self, name: str, cells: Mapping[str, Any], *, deep: bool) -> Any:
        given = self.given.get(name)
        if given is None:
            value = next((cells[one] for one in KNOWN.get(name, (name,)) if cells.get(one) is not None), None)
            return _listed(name, value)
        if isinstance(given, tuple):
            return [_at(one, cells, deep=deep) for one in given]
        return _listed(name, _at(given, cells, deep=deep))


def _at(column: str, cells: Mapping[str, Any], *, deep: bool) -> Any:
    if column in cells:
        return cells[column]
    first, _, rest = column.partition(".")
    if first not in cells:
        raise InputError(Problem(f"there is no column {column}; the row has {', '.join(map(str, cells)) or 'none'}"))
    return _inside(cells[first], rest.split("."), column) if deep and rest else cells[first]


def _inside(value: Any, path: Sequence[str], column: str) -> Any:
    if not path or not path[0]:
        return value
    if isinstance(value, Mapping) and path[0] in value:
        return _inside(value[path[0]], path[1:], column)
    if isinstance(value, list):
        return [_inside(one, path, column) for one in value]
    raise InputError(Problem(f"column {column}: there is no {path[0]} in {value!r:.60}"))


def _listed(name: str, value: Any) -> Any:
    """A list that stands in a cell of text."""
    if name in _LISTS and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise InputError(Problem(f"not a JSON list: {error}", field=name)) from error
    return value
