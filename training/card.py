"""The card of a checkpoint, its README.md: what it can do, how well, and what it was made of. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from training.config import RunConfig
from training.evaluate import Scores, table
from training.examples import Split, TaskData

_LABELS_SHOWN = 12


def card(
    config: RunConfig,
    data: Mapping[str, TaskData],
    *,
    scores: dict[str, Scores],
    source: str,
    command: str,
    versions: Mapping[str, str],
) -> str:
    """Markdown with the metadata block that model hubs read."""
    first = next(iter(data))
    sample = data[first].kind.sample(data[first].options).model_dump(mode="json", exclude_none=True)
    parts = [
        _metadata(config),
        f"# {', '.join(data)}",
        f"A multitask checkpoint for mtserve: one trunk (`{source}`), {len(data)} task{'s' * (len(data) > 1)}.",
        "## Tasks",
        _markdown([("task", "kind", "labels", "train rows", "eval rows"), *(_task(n, d) for n, d in data.items())]),
        "## Evaluation",
        "On the evaluation split of each task, through the serving engine; the baseline is the constant answer that "
        "the training labels alone suggest.",
        _markdown(table(scores, all_metrics=True)),
        "## Use",
        f'```python\nimport mtserve\n\nengine = mtserve.load("path/to/this/folder")\n'
        f"engine.predict({json.dumps(first)}, [{json.dumps(sample, ensure_ascii=False)}])\n```",
        "## Training",
        f"```\n{command}\n```",
        f"Seed {config.seed}. Licence: {config.license or 'not stated'}. "
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "## Data",
        _markdown([("task", "split", "source", "rows", "left out", "sha256"), *_sources(config, data)]),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(config: RunConfig) -> str:
    licence = [f"license: {json.dumps(config.license)}"] if config.license else []
    return "\n".join(["---", "library_name: mtserve", *licence, "tags: [multitask]", "---"])


def _task(name: str, data: TaskData) -> tuple[str, ...]:
    labels = data.kind.label_names(data.options)
    shown = ", ".join(labels[:_LABELS_SHOWN]) + (f", … ({len(labels)})" if len(labels) > _LABELS_SHOWN else "")
    return name, data.kind.name, shown, str(len(data.train)), str(len(data.eval))


def _sources(config: RunConfig, data: Mapping[str, TaskData]) -> list[tuple[str, ...]]:
    def line(task: str, which: str, shown: str, split: Split) -> tuple[str, ...]:
        return task, which, f"`{shown}`", str(len(split)), str(len(split.bad.messages)), f"`{split.sha256}`"

    return [
        line(name, which, source.shown, split)
        for name, of_task in data.items()
        for which, source, split in (
            ("train", config.tasks[name].train, of_task.train),
            ("eval", config.tasks[name].eval, of_task.eval),
        )
    ]


def _markdown(lines: Sequence[Sequence[Any]]) -> str:
    """A table; bars inside cells are escaped."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    header, *rest = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([header, "|" + " --- |" * len(cells[0]), *rest])
