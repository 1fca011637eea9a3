"""What is to be known of data before training on it: repeats, overlaps, label drift, lengths. Judges no model.

Two inputs are the same when they have the same words: case and white space do not count. Of every input 64 bits of a
hash are kept, not its text, so an audit of millions of examples takes megabytes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mtserve.tasks.base import AnyKind, Example
from mtserve.tasks.measures import Array
from training.data.examples import Split
from training.data.splits import TaskData
from training.report.tables import Line, aligned

_NOTABLE = 0.01
_DRIFT = 0.05


@dataclass(frozen=True)
class SplitAudit:
    """Counts of a split.

    left_out   records that could not be used
    repeated   examples whose input an earlier example of the split has
    labels     how often each label occurs (a band of scores, the place of a right choice)
    absent     labels of the task that do not occur
    drift      total variation distance of the label shares from training's, in [0, 1]
    chance     the distance that is to be expected of samples of these sizes from one distribution
    tokens     mean, median, p95 and max of the tokens of an example, over its rows
    cut        examples that are cut to the limit; `lost` is the share of the split's tokens that this costs
    """

    examples: int
    left_out: int
    repeated: int
    labels: dict[str, int]
    absent: tuple[str, ...]
    drift: float
    chance: float
    tokens: dict[str, float]
    cut: int
    lost: float


@dataclass(frozen=True)
class TaskAudit:
    """A task's splits; `conflicts` of its `inputs`, each counted once, have more than one truth."""

    max_length: int
    inputs: int
    conflicts: int
    splits: dict[str, SplitAudit]


@dataclass(frozen=True)
class Overlap:
    """How many examples of a split have an input that another split has, which training or selection has seen."""

    task: str
    split: str
    other_task: str
    other_split: str
    examples: int


@dataclass(frozen=True)
class Audit:
    """The findings, ready for JSON through `dataclasses.asdict`."""

    tasks: dict[str, TaskAudit]
    overlaps: tuple[Overlap, ...]

    def table(self) -> list[Line]:
        """One line a split under a header."""
        counted = ("task", "split", "examples", "left out", "repeated", "in train")
        lines: list[Line] = [(*counted, "median", "p95", "max", "limit", "cut")]
        seen = {
            (o.task, o.split): o.examples for o in self.overlaps if (o.other_task, o.other_split) == (o.task, "train")
        }
        for name, task in self.tasks.items():
            for which, s in task.splits.items():
                tokens = (s.tokens["median"], s.tokens["p95"], s.tokens["max"], task.max_length)
                counts = (s.examples, s.left_out, s.repeated, "" if which == "train" else seen.get((name, which), 0))
                lines.append((name, which, *map(str, counts), *(f"{n:.0f}" for n in tokens), str(s.cut)))
        return lines

    def warnings(self) -> list[str]:
        """Sentences about what is notable: more than 1 % of a split, a drift beyond chance, a label that is absent."""
        found = []
        for o in self.overlaps:
            size = self.tasks[o.task].splits[o.split].examples
            if o.examples > _NOTABLE * size:
                shown = f"{o.examples} of {size} inputs ({o.examples / size:.1%})"
                found.append(f"{o.task} {o.split}: {shown} are also in {o.other_task} {o.other_split}")
        for name, task in self.tasks.items():
            if task.conflicts > _NOTABLE * task.inputs:
                found.append(f"{name}: {task.conflicts} of {task.inputs} inputs have more than one truth")
            found += [f"{name} {which}: {fault}" for which, split in task.splits.items() for fault in _faults(split)]
        return found

    def lines(self) -> list[str]:
        """The table and the warnings, for a terminal."""
        return [*aligned(self.table()), *(f"warning: {sentence}" for sentence in self.warnings())]


def audit(data: Mapping[str, TaskData]) -> Audit:
    """Look at every split of every task, at each example once."""
    facts = {name: {which: _Facts.of(s, task) for which, s in task.splits.items()} for name, task in data.items()}
    return Audit({name: _task(task, facts[name]) for name, task in data.items()}, tuple(_overlaps(facts)))


@dataclass(frozen=True)
class _Facts:
    """(examples,) hashes of a split's inputs and truths, and its labels."""

    inputs: Array
    truths: Array
    labels: Counter[str]

    @classmethod
    def of(cls, split: Split, task: TaskData) -> _Facts:
        inputs, truths = np.empty((2, len(split)), np.uint64)
        labels: Counter[str] = Counter()
        for at, example in enumerate(split.examples):
            inputs[at], truths[at] = _hashes(example, task.kind)
            labels.update(task.kind.truths(example, task.options))
        return cls(inputs, truths, labels)


def _hashes(example: Example, kind: AnyKind) -> tuple[int, int]:
    """Of the words of an example's input, field by field, and of its truth as it stands."""
    words, truth = [], []
    for name, value in example:
        if name not in kind.example.model_fields:
            truth.append(repr(value))
        elif value is not None:
            texts = value if isinstance(value, tuple) else (value,)
            words.append(" ".join(" ".join(map(str, texts)).casefold().split()))
    first, second = (hashlib.blake2b("\0".join(side).encode(), digest_size=8).digest() for side in (words, truth))
    return int.from_bytes(first), int.from_bytes(second)


def _task(task: TaskData, facts: Mapping[str, _Facts]) -> TaskAudit:
    pairs = np.unique(np.concatenate([np.stack([f.inputs, f.truths], 1) for f in facts.values()]), axis=0)
    inputs, truths = np.unique(pairs[:, 0], return_counts=True)
    train = facts["train"].labels
    known = dict.fromkeys([*task.kind.label_names(task.options), *sorted(train)])
    splits = {which: _split(split, facts[which], train=train, known=known) for which, split in task.splits.items()}
    return TaskAudit(task.options.max_length, len(inputs), int((truths > 1).sum()), splits)


def _split(split: Split, facts: _Facts, *, train: Counter[str], known: Iterable[str]) -> SplitAudit:
    lengths, cut = np.asarray(split.lengths), np.asarray(split.cut)
    median, p95, most = np.percentile(lengths, (50, 95, 100)).tolist()
    drift, chance = _drift(train, facts.labels)
    return SplitAudit(
        examples=len(split),
        left_out=len(split.bad.messages),
        repeated=len(split) - len(np.unique(facts.inputs)),
        labels=dict(sorted(facts.labels.items())),
        absent=tuple(label for label in known if label not in facts.labels),
        drift=drift,
        chance=chance,
        tokens={"mean": float(lengths.mean()), "median": median, "p95": p95, "max": most},
        cut=int((cut > 0).sum()),
        lost=float(cut.sum() / (cut.sum() + lengths.sum())),
    )


def _drift(train: Counter[str], other: Counter[str]) -> tuple[float, float]:
    """The distance of two label distributions, and what it is on average for two samples of these sizes from one: half
    the sum of the mean absolute differences of the shares (normal approximation)."""
    n, m = train.total(), other.total()
    if not (n and m) or train is other:
        return 0.0, 0.0
    labels = sorted(train.keys() | other.keys())
    shares = [(train[label] + other[label]) / (n + m) for label in labels]
    chance = sum(math.sqrt(2 / math.pi * p * (1 - p) * (1 / n + 1 / m)) for p in shares) / 2
    return sum(abs(train[label] / n - other[label] / m) for label in labels) / 2, chance


def _overlaps(facts: Mapping[str, Mapping[str, _Facts]]) -> Iterator[Overlap]:
    """Of held-out splits with the training of every task, and of a test split with its task's evaluation split."""
    for name, splits in facts.items():
        pairs = [(which, other, "train") for which in splits if which != "train" for other in facts]
        for which, other, seen in pairs + ([("test", name, "eval")] if "test" in splits else []):
            shared = int(np.isin(splits[which].inputs, facts[other][seen].inputs).sum())
            if shared:
                yield Overlap(name, which, other, seen, shared)


def _faults(split: SplitAudit) -> Iterator[str]:
    if split.left_out > _NOTABLE * (split.examples + split.left_out):
        yield f"{split.left_out} of {split.examples + split.left_out} records are left out"
    if split.repeated > _NOTABLE * split.examples:
        yield f"{split.repeated} of {split.examples} inputs occur earlier in the split"
    if split.cut > _NOTABLE * split.examples:
        yield f"{split.cut} of {split.examples} inputs are cut to the limit, which loses {split.lost:.1%} of the tokens"
    if split.drift > max(_DRIFT, 2 * split.chance):
        yield f"labels drift from training's by {split.drift:.2f} (chance would give {split.chance:.2f})"
    if split.absent:
        more = f" and {len(split.absent) - 5} more labels" if len(split.absent) > 5 else ""
        yield f"no example of {', '.join(split.absent[:5])}{more}"
