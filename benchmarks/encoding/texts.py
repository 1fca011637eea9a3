"""The two sets of texts that are encoded, shuffled with seed 0: rows as three tasks encode them, and single sentences.

    A   the rows of the dev splits of STS-B, RTE and CommonsenseQA: pairs, and a question with each of its choices
    B   every sentence of those splits alone: both texts of the pairs, questions and choices, each time it occurs

STS-B has a dev split; of the others a tenth of the training records is carved out, as the recipe `glue_trio` does. That
recipe says what a task's options are (but that pairs and choices are read together only, no text apart), and the
kinds make the rows. Knows no engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import training
from mtserve.rows import Row
from mtserve.text import Limits, Text
from training.config import Carve, TaskConfig
from training.data.records import Records, read_records
from training.data.splits import carve
from training.runfile import read_config

SEED = 0
RECIPE = Path(training.__file__).parent / "recipes" / "glue_trio.yaml"
SINGLE = Limits(max_length=256)


@dataclass(frozen=True)
class Texts:
    """Set A as rows, set B as texts, and how many records of each task they come from."""

    pairs: list[Row]
    singles: list[str]
    records: dict[str, int]


def read_texts(data: Path, text: Text) -> Texts:
    """Raises ConfigError where a file is missing."""
    together = ("tasks.stsb.options.method=regression", "tasks.commonsenseqa.options.method=joint")
    config = read_config(RECIPE, [f"data_dir={data}", "trunk=unused", *together])
    pairs: list[Row] = []
    singles: list[str] = []
    records = {}
    for name, task in config.tasks.items():
        held = _held_out(task, data)
        options = task.handler.options.model_validate(task.handler.fit(held.table, task.options))
        records[name] = len(held.table)
        for record in held.table:
            fields = {field: record[field] for field in task.handler.labelled.model_fields}
            example = task.handler.labelled.model_validate(fields)
            pairs += task.handler.rows(example, options, text)
            singles += _sentences(example)
    return shuffled(Texts(pairs, singles, records))


def few_texts(text: Text) -> Texts:
    """A handful that needs no files, to see that everything runs."""
    singles = [f"{'a very ' * (at % 5)}short text, number {at}" for at in range(12)]
    rows = [row for first in singles for row in text.rows(first, singles[0], limits=SINGLE)]
    return shuffled(Texts(rows, singles, {"few": len(singles)}))


def shuffled(texts: Texts) -> Texts:
    for one in (texts.pairs, texts.singles):
        random.Random(SEED).shuffle(one)  # noqa: S311 - no secret
    return texts


def _held_out(task: TaskConfig, data: Path) -> Records:
    train = read_records(task.handler, task.train, base=data, policy="stop")
    if isinstance(task.eval, Carve):
        return carve(train, {"eval": task.eval})["eval"]
    return read_records(task.handler, task.eval, base=data, policy="stop")


def _sentences(example: BaseModel) -> Iterator[str]:
    """The texts of an example, each alone."""
    fields: dict[str, Any] = example.model_dump()
    yield from (fields[name] for name in ("text", "text_pair", "question") if name in fields)
    yield from fields.get("choices", ())
