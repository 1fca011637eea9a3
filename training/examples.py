"""Records to labelled examples to features, by the kind's own schema and its one featurisation. Knows no format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mtserve.errors import ConfigError, InputError
from mtserve.rows import Row
from mtserve.tasks.base import AnyKind, Example, Options
from mtserve.tasks.validation import validate
from mtserve.text import Text
from training.config import TaskConfig
from training.readers import BadRecord, Record
from training.source import Source, fingerprint, read

Feature = tuple[list[Row], Any]
"""The rows of a training example and the target that its loss compares their logits with."""


@dataclass
class BadRecords:
    """What happens to records that cannot be used: the first stops the run, or all are counted and left out."""

    policy: Literal["stop", "skip"]
    messages: list[str] = field(default_factory=list)

    def add(self, where: str, message: str) -> None:
        """Raises ConfigError under `stop`."""
        if self.policy == "stop":
            raise ConfigError(f"{where}: {message} (on_bad_record: skip would leave such records out)")
        self.messages.append(f"{where}: {message}")


@dataclass(frozen=True)
class Split:
    """The usable labelled examples of one source, each with its place, and what identifies the data."""

    examples: list[Example]
    places: list[str]
    bad: BadRecords
    sha256: str

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class TaskData:
    """A task's splits and options; `features` has one entry for each training example."""

    kind: AnyKind
    options: Options
    train: Split
    eval: Split
    features: list[Feature]


def read_task(
    name: str, config: TaskConfig, text: Text, *, base: Path, on_bad_record: Literal["stop", "skip"]
) -> TaskData:
    """Read both splits of a task, fit its options on the training split and featurise it.

    Raises ConfigError for unusable records under `stop`, for a split without a usable record, for wrong options, and
    for an evaluation label that training never saw.
    """
    kind = config.handler
    train = _split(kind, config.train, base, on_bad_record)
    evaluation = _split(kind, config.eval, base, on_bad_record)
    options = _options(name, kind, config.options, train)
    _known_labels(name, kind, options, evaluation)
    train, features = _usable(kind, options, text, train)
    evaluation, _ = _usable(kind, options, text, evaluation)
    for which, split in (("train", train), ("eval", evaluation)):
        if not split.examples:
            first = f"; the first: {split.bad.messages[0]}" if split.bad.messages else ""
            raise ConfigError(f"tasks.{name}.{which} has no usable record ({len(split.bad.messages)} bad ones{first})")
    return TaskData(kind, options, train, evaluation, features)


def _split(kind: AnyKind, source: Source, base: Path, policy: Literal["stop", "skip"]) -> Split:
    split = Split([], [], BadRecords(policy), fingerprint(source, base))
    for record in read(source, base):
        if isinstance(record, BadRecord):
            split.bad.add(record.where, record.message)
            continue
        try:
            fields = _fields(record, kind.labelled.model_fields, source.columns)
            split.examples.append(validate(kind.labelled, fields))
            split.places.append(record.where)
        except InputError as error:
            split.bad.add(record.where, str(error))
    return split


def _fields(record: Record, names: Iterable[str], columns: Mapping[str, str]) -> dict[str, Any]:
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


def _options(name: str, kind: AnyKind, given: Mapping[str, Any], train: Split) -> Options:
    """The task's options, with what training fits (label names) filled in. Raises ConfigError."""
    fitted = kind.fit([e.model_dump() for e in train.examples], given)
    try:
        options: Options = kind.options.model_validate(fitted)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("tasks", name, "options", *found["loc"])))
        raise ConfigError(
            f"{where}: {found['msg'].removeprefix('Value error, ')}; found {found['input']!r:.80}"
        ) from error
    return options


def _known_labels(name: str, kind: AnyKind, options: Options, evaluation: Split) -> None:
    known = kind.label_names(options)
    for example, place in zip(evaluation.examples, evaluation.places, strict=True):
        for label in kind.fit([example.model_dump()], {}).get("labels", ()):
            if label not in known:
                found = f"evaluation label {label!r} is none that training saw ({', '.join(known)})"
                raise ConfigError(f"tasks.{name}: {place}: {found}")


def _usable(kind: AnyKind, options: Options, text: Text, split: Split) -> tuple[Split, list[Feature]]:
    """The split without the examples that cannot be featurised under the options, and the features of the others."""
    kept, features = Split([], [], split.bad, split.sha256), []
    for example, place in zip(split.examples, split.places, strict=True):
        try:
            kind.check(kind.unlabelled(example), options, kind.parameters())
            features.append(kind.features(example, options, text))
        except InputError as error:
            split.bad.add(place, str(error))
            continue
        kept.examples.append(example)
        kept.places.append(place)
    return kept, features


def tokens(features: Sequence[Feature]) -> int:
    """Real tokens of some training examples, over all their rows."""
    return sum(len(row) for rows, _ in features for row in rows)
