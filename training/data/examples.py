"""Labelled examples to features, as an Arrow table on disk: tokenised once, by the kind's own featurisation.

A `datasets.Dataset` named by a fingerprint of the records, the options, the tokenizer, the preparation and this
package's own code: a second run tokenises nothing, and a run that differs in any of these starts afresh. Knows no
format and no model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, overload

import datasets
import numpy as np
from datasets import ClassLabel, Features, List, Value

from mtserve.errors import InputError
from mtserve.rows import Row, make_row
from mtserve.tasks.base import AnyKind, Example, Options
from mtserve.text import Text
from training.data.records import BadRecords, Records, making, mark, sorted_out

Feature = tuple[list[Row], Any]
"""The rows of a training example and the target that its loss compares their logits with."""

T_ = TypeVar("T_")
_ROWS = {
    "_ids": List(List(Value("int32"))),
    "_type_ids": List(List(Value("int32"))),
    "_special": List(List(Value("bool"))),
    "_part": List(Value("int32")),
    "_cut": List(Value("int32")),
    "_second": List(Value("int32")),
    "_target": Value("string"),
}


class Lazy(Sequence[T_]):
    """Items made from the rows of a table when they are asked for."""

    def __init__(self, table: datasets.Dataset, make: Callable[[Mapping[str, Any]], T_]) -> None:
        self._table, self._make = table, make

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> T_: ...
    @overload
    def __getitem__(self, index: slice) -> list[T_]: ...
    def __getitem__(self, index: int | slice) -> T_ | list[T_]:
        if isinstance(index, slice):
            return self.of(range(*index.indices(len(self))))
        return self._make(self._table[index])

    def __iter__(self) -> Iterator[T_]:
        for start in range(0, len(self), 1000):
            yield from self.of(range(start, min(start + 1000, len(self))))

    def of(self, indexes: Sequence[int]) -> list[T_]:
        """Several items, read at once."""
        columns = self._table[list(indexes)]
        return [self._make(dict(zip(columns, cells, strict=True))) for cells in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Split:
    """The usable labelled examples of one source with their features, and what identifies the data.

    table   one row an example: the fields of the labelled example (class names as `ClassLabel`), its trunk rows, its
            target, and `_where` it came from
    """

    kind: AnyKind
    table: datasets.Dataset
    bad: BadRecords
    sha256: str

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def examples(self) -> Lazy[Example]:
        fields = self.kind.labelled.model_fields
        named = {name: feature for name, feature in self.table.features.items() if name in fields}

        def example(row: Mapping[str, Any]) -> Example:
            cells = {name: _named(feature, row[name]) for name, feature in named.items() if row[name] is not None}
            made: Example = self.kind.labelled.model_validate(cells)
            return made

        return Lazy(self.table.select_columns(list(named)), example)

    @cached_property
    def features(self) -> Lazy[Feature]:
        return Lazy(self.table.select_columns(list(_ROWS)), _feature)

    @cached_property
    def places(self) -> list[str]:
        return list(self.table["_where"])

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example, over its rows."""
        return [sum(map(len, ids)) for ids in self.table["_ids"]]

    @cached_property
    def cut(self) -> list[int]:
        """Tokens of each example that its rows leave out."""
        return [sum(cut) for cut in self.table["_cut"]]

    @cached_property
    def repairs(self) -> dict[str, int]:
        """How many repairs the reader made, by type."""
        return dict(Counter(one for repairs in self.table["_repairs"] for one in repairs or ()))


def featurise(kind: AnyKind, options: Options, text: Text, records: Records, *, tokenizer: str) -> Split:
    """Rows and target of every record that the options allow; `tokenizer` is the hash of its file.

    Raises ConfigError under `stop`.
    """
    plain = records.table.features
    names = kind.classes(options)
    fields = {n: _classes(f, names[n]) if n in names else f for n, f in plain.items()}

    def features(example: dict[str, Any]) -> dict[str, Any]:
        try:
            cells = {n: v for n, v in example.items() if n in kind.labelled.model_fields and v is not None}
            labelled = kind.labelled.model_validate(cells)
            kind.check(kind.unlabelled(labelled), options, kind.parameters())
            rows, target = kind.features(labelled, options, text)
        except InputError as error:
            return {**dict.fromkeys([*_ROWS, *names]), "_error": str(error)}
        return {
            "_ids": [row.ids for row in rows],
            "_type_ids": [row.type_ids for row in rows],
            "_special": [row.special for row in rows],
            "_part": [row.part for row in rows],
            "_cut": [row.cut for row in rows],
            "_second": [row.second for row in rows],
            "_target": json.dumps(target, default=lambda array: array.tolist()),
        }

    made_of = (records.mark, kind.name, options.model_dump(mode="json"), text.spec.model_dump(mode="json"), tokenizer)
    columns = Features({**fields, **_ROWS})
    with making():
        table = records.table.map(features, features=columns, new_fingerprint=mark("features", *made_of))
    bad, kept = sorted_out(table, records.bad.policy)
    bad.messages[:0] = records.bad.messages
    return Split(kind, table if len(kept) == len(table) else table.select(kept), bad, records.sha256)


def _classes(feature: Any, names: Sequence[str]) -> Any:
    """The feature with its texts as classes."""
    if isinstance(feature, List):
        return List(_classes(feature.feature, names))
    if isinstance(feature, dict):
        return {name: _classes(inner, names) for name, inner in feature.items()}
    return ClassLabel(names=list(names)) if feature == Value("string") else feature


def _named(feature: Any, value: Any) -> Any:
    """A value with class numbers replaced by their names."""
    if isinstance(feature, ClassLabel):
        return feature.int2str(value)
    if isinstance(feature, List):
        return [_named(feature.feature, one) for one in value]
    if isinstance(feature, dict):
        return {name: _named(inner, value[name]) for name, inner in feature.items()}
    return value


def _feature(cells: Mapping[str, Any]) -> Feature:
    """Rows and target of a table's row; rows without offsets, which only decoding needs."""
    rows = [
        replace(make_row(ids, types, np.zeros((len(ids), 2)), special), part=part, cut=cut, second=second)
        for ids, types, special, part, cut, second in zip(
            *(cells[name] for name in ("_ids", "_type_ids", "_special", "_part", "_cut", "_second")), strict=True
        )
    ]
    return rows, _target(json.loads(cells["_target"]))


def _target(plain: Any) -> Any:
    """A target as `Kind.features` made it: numbers, arrays (of classes or of shares), or one array a row."""
    if not isinstance(plain, list):
        return plain
    if plain and isinstance(plain[0], list):
        return [np.asarray(row, np.int64) for row in plain]
    return np.asarray(plain, np.float32 if plain and isinstance(plain[0], float) else np.int64)
