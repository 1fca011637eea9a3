"""A task's splits: read, carved where one file must serve for several, labels fitted on training, featurised."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtserve.errors import ConfigError
from mtserve.tasks.base import AnyKind, Options
from mtserve.text import Text
from training.config import Carve, TaskConfig
from training.data.examples import Split, featurise
from training.data.records import Policy, Records, read_records


@dataclass(frozen=True)
class TaskData:
    """A task's splits under its options; `test` is None where the run names none."""

    kind: AnyKind
    options: Options
    train: Split
    eval: Split
    test: Split | None = None

    @property
    def splits(self) -> dict[str, Split]:
        found = {"train": self.train, "eval": self.eval}
        return found if self.test is None else {**found, "test": self.test}


def read_task(
    name: str,
    config: TaskConfig,
    text: Text,
    *,
    base: Path,
    on_bad_record: Policy,
    tokenizer_json: str,
    limit: int | None = None,
) -> TaskData:
    """Read the splits of a task, fit its options on the training split and featurise all.

    Raises ConfigError for unusable records under `stop`, for a split without a usable record, for wrong options, and
    for an evaluation label that training never saw.
    """
    kind = config.handler
    records = _records(config, kind, base, on_bad_record, limit)
    options = _options(name, kind, config.options, records["train"])
    for which, of_split in records.items():
        if which != "train":
            _known_labels(name, kind, options, of_split)
    tokenizer = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    splits = {which: featurise(kind, options, text, r, tokenizer=tokenizer) for which, r in records.items()}
    for which, split in splits.items():
        if not len(split):
            part = getattr(config, which)
            if isinstance(part, Carve) and not split.bad.messages:
                raise ConfigError(
                    f"tasks.{name}.{which}: {part.shown}, takes no record; allowed: a larger share, more data"
                )
            first = f"; the first: {split.bad.messages[0]}" if split.bad.messages else ""
            raise ConfigError(f"tasks.{name}.{which} has no usable record ({len(split.bad.messages)} bad ones{first})")
    return TaskData(kind, options, **splits)


def _records(config: TaskConfig, kind: AnyKind, base: Path, policy: Policy, limit: int | None) -> dict[str, Records]:
    """The records of each split; carved splits are parts of the training source, which keeps the rest."""
    sources = {"train": config.train, "eval": config.eval, **({} if config.test is None else {"test": config.test})}
    carved = {which: one for which, one in sources.items() if isinstance(one, Carve)}
    by = next((one.by for one in carved.values()), None)
    of = partial(
        read_records, kind, base=base, policy=policy, plural=bool(config.options.get("multi_label")), limit=limit
    )
    found = {
        which: of(one, group=by if which == "train" else None)
        for which, one in sources.items()
        if not isinstance(one, Carve)
    }
    return {**found, **carve(found["train"], carved)} if carved else found


def carve(whole: Records, parts: Mapping[str, Carve]) -> dict[str, Records]:
    """Disjoint random parts of the records, and `train`, the rest.

    Without groups a part has exactly its share of the records. Groups stay whole, and a group's part follows from the
    seed and its own name alone: tasks that see other records of the same groups, or fewer, agree on it. A part then has
    about its share of the groups. The share `skip` comes first, and no part has it.
    """
    first = next(iter(parts.values()))
    places = _places(whole.table["_group"], seed=first.seed)
    owners, low = ["" if place < first.skip else "train" for place in places], first.skip
    for which, part in parts.items():
        high = round(low + part.carve, 12)
        owners = [which if low <= place < high else owner for place, owner in zip(places, owners, strict=True)]
        low = high
    split = {w: whole.some([at for at, owner in enumerate(owners) if owner == w]) for w in ("train", *parts)}
    split["train"].bad.messages.extend(whole.bad.messages)
    return {"train": split.pop("train"), **split}


def _places(groups: Sequence[str | None], *, seed: int) -> list[float]:
    """A number in [0, 1) for each record: by hash of its group, or, where there are none, evenly spread."""
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    hashes = [None if group is None else hashlib.sha256(f"{seed} {group}".encode()).digest()[:6] for group in groups]
    return [at / len(order) if h is None else int.from_bytes(h) / 256**6 for at, h in zip(order, hashes, strict=True)]


def _options(name: str, kind: AnyKind, given: Mapping[str, Any], train: Records) -> Options:
    """The task's options, with what training fits (label names) filled in. Raises ConfigError."""
    fields = train.table.select_columns(list(kind.labelled.model_fields))
    fitted = kind.fit(fields, given)
    try:
        options: Options = kind.options.model_validate(fitted)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("tasks", name, "options", *found["loc"])))
        raise ConfigError(
            f"{where}: {found['msg'].removeprefix('Value error, ')}; found {found['input']!r:.80}"
        ) from error
    return options


def _known_labels(name: str, kind: AnyKind, options: Options, records: Records) -> None:
    """Raise ConfigError for a label of an evaluation split that training never saw."""
    known = kind.label_names(options)
    for row in records.table.select_columns([*kind.labelled.model_fields, "_where"]):
        for label in kind.fit([row], {}).get("labels", ()):
            if label not in known:
                found = f"evaluation label {label!r} is none that training saw ({', '.join(known)})"
                raise ConfigError(f"tasks.{name}: {row['_where']}: {found}")
