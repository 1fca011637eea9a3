"""Splits and tasks made of plain lists, where a test needs no files and no features."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from training.pretraining import TRAINING_KINDS


@dataclass
class FakeSplit:
    examples: list[Any]
    lengths: list[int]
    cut: list[int]
    features: list[Any] = field(default_factory=list)
    bad: Any = field(default_factory=lambda: SimpleNamespace(messages=[]))
    sha256: str = "0" * 64

    def __len__(self) -> int:
        return len(self.examples)


@dataclass
class FakeTask:
    kind: Any
    options: Any
    splits: dict[str, FakeSplit]

    @property
    def train(self) -> FakeSplit:
        return self.splits["train"]


def task(kind: str, raw: dict[str, Any], **splits: list[dict[str, Any]]) -> Any:
    """A task of these records; an example has as many tokens as its longest text has words."""
    handler = TRAINING_KINDS[kind]
    made = {}
    for which, records in splits.items():
        texts = [[value for value in record.values() if isinstance(value, str)] for record in records]
        lengths = [max((len(text.split()) for text in of_record), default=1) for of_record in texts]
        made[which] = FakeSplit([handler.labelled.model_validate(r) for r in records], lengths, [0] * len(records))
    return FakeTask(handler, handler.options.model_validate(raw), made)
