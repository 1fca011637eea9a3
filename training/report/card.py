"""The card of a checkpoint, its README.md: what it can do, how well, and what it was made of. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import yaml

from mtserve.tasks.calibration import Calibration
from training.config import RunConfig
from training.data.audit import Audit
from training.data.splits import TaskData
from training.report.evaluate import Scores, signed, table
from training.report.tables import Line, fenced, markdown
from training.report.transfer import cosine_table

_LABELS_SHOWN = 12
_HUB = {
    "classification": "text-classification",
    "similarity": "sentence-similarity",
    "generation": "text-generation",
    "bleu_lower": "bleu",
    "macro_f1": "f1",
    "micro_f1": "f1",
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
"""What hubs call our kinds and metrics."""
_WHAT = {
    "checkpoint": "A multitask checkpoint for mtserve",
    "trunk": "A trunk for plain Transformers",
    "heads": "Heads on the trunk of this checkpoint",
}


def card(
    config: RunConfig,
    data: Mapping[str, TaskData],
    *,
    scores: Mapping[str, Scores],
    audit: Audit,
    source: str,
    command: str,
    versions: Mapping[str, str],
    test: Mapping[str, Scores] = MappingProxyType({}),
    calibrations: Mapping[str, Calibration] = MappingProxyType({}),
    cosines: Mapping[tuple[str, str], float] = MappingProxyType({}),
    sizes: Mapping[str, float] = MappingProxyType({}),
    figures: Collection[str] = (),
) -> str:
    """Markdown with the metadata block that model hubs read.

    scores    of each task on its evaluation split; `test` of those that have a test split; `calibrations` of those
              whose scores were fitted
    cosines   of tasks' gradients, and their sizes, where they were measured
    source    what the trunk is called
    figures   names of the pictures beside the card, as `training.report.figures.figures` gives them
    """
    parts = [
        "" if config.result == "heads" else _metadata(config, data, [*scores.items(), *test.items()]),
        f"# {', '.join(data)}",
        f"{_WHAT[config.result]}: `{source}`, trained on {len(data)} task{'s' * (len(data) > 1)}.",
        "## Tasks",
        markdown([("task", "kind", "labels"), *(_task(name, of) for name, of in data.items())]),
        "## Evaluation",
        *_evaluation(config, scores, test),
        *_calibrated(calibrations),
        *(part for name, found in scores.items() for part in _by_label(name, found, figures)),
        "## Use",
        fenced(_usage(config, data), "python"),
        "## Training",
        _picture("Loss and metric of each task in training", "figures/curves.png", figures),
        *cosine_table(cosines, sizes),
        fenced(command),
        f"Seed {config.seed}. Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        _folded(
            "The run file with its defaults", fenced(_yaml(config.model_dump(mode="json", exclude_none=True)), "yaml")
        ),
        "## Data",
        markdown([("task", "split", "source", "licence", "sha256"), *_sources(config, data)]),
        "Before training; lengths are in tokens, and inputs that differ in case and white space alone are the same.",
        markdown(audit.table()),
        "\n".join(f"- {sentence}." for sentence in audit.warnings()),
        "## Licence",
        f"Of this checkpoint: {config.license or 'not stated'}. Those of its trunk and data bind its use as well.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _metadata(config: RunConfig, data: Mapping[str, TaskData], found: list[tuple[str, Scores]]) -> str:
    """The YAML block: library, licence, and `model-index` with a result for each task and split."""
    results = []
    for name, scores in found:
        kind, shown = data[name].kind.name, _shown(config, name)[scores.split]
        measured = scores.metrics.items()
        results.append(
            {
                "task": {"type": _HUB.get(kind, kind.replace("_", "-")), "name": name},
                "dataset": {"type": shown, "name": shown, "split": scores.split},
                "metrics": [{"type": _HUB.get(m, m), "name": m, "value": value} for m, value in measured],
            }
        )
    block: dict[str, Any] = {"library_name": "mtserve", "tags": ["multitask"]}
    if config.license:
        block["license"] = config.license
    return f"---\n{_yaml({**block, 'model-index': [{'name': ', '.join(data), 'results': results}]})}---"


def _task(name: str, data: TaskData) -> Line:
    labels = data.kind.label_names(data.options)
    more = f", … ({len(labels)})" if len(labels) > _LABELS_SHOWN else ""
    return name, data.kind.name, ", ".join(labels[:_LABELS_SHOWN]) + more


def _evaluation(config: RunConfig, scores: Mapping[str, Scores], test: Mapping[str, Scores]) -> Iterator[str]:
    yield (
        "Through the serving engine. Beside each value stands what needs no training: `majority`, the constant answer "
        "that the training labels suggest, `copy`, the input given back, and `zero-shot`, the trunk before training "
        "under a template of its own, where these can be an answer."
    )
    yield "\n".join(f"- {line}" for line in signed(scores))
    for name, judge in ((name, task.judge) for name, task in config.tasks.items() if task.judge is not None):
        yield (
            f"`style_accuracy` of {name}: answers that the task {judge.task} of `{judge.checkpoint}` calls "
            f"{judge.label}; `_targets` real targets that it calls so, `_sources` real sources that it does not."
        )
    drawn: dict[int, list[str]] = {}
    for name, one in scores.items():
        drawn.setdefault(one.resamples, []).append(name)
    if any(drawn):
        counts = "; ".join(f"{count} for {', '.join(names)}" for count, names in drawn.items())
        yield f"Intervals are percentiles of a bootstrap over examples (resamples: {counts})."
    for split, found in (("evaluation", scores), ("test", test)):
        if found:
            sizes = ", ".join(f"{name} {one.examples}" for name, one in found.items())
            yield f"On the {split} split (examples: {sizes}):"
            yield markdown(table(found, all_metrics=True))


def _by_label(name: str, scores: Scores, figures: Collection[str]) -> Iterator[str]:
    """A task's scores of each label, and its confusion matrix."""
    if scores.report:
        lines: list[Line] = [("label", "precision", "recall", "f1", "support")]
        for label, of in scores.report.items():
            lines.append((label, *(f"{of[key]:.3f}" for key in ("precision", "recall", "f1")), str(of["support"])))
        yield _folded(f"{name}: each label", markdown(lines))
    yield _picture(f"Confusion matrix of {name}", f"figures/confusion-{name}.png", figures)


def _calibrated(found: Mapping[str, Calibration]) -> Iterator[str]:
    if found:
        yield (
            "Temperatures and thresholds were fitted on the evaluation split, so metrics by thresholds flatter there. "
            "Expected calibration error (15 bins) before and after; after: of each half of the split by the "
            "temperature of the other half."
        )
        lines: list[Line] = [("task", "temperature", "before", "after", "thresholds")]
        for name, one in found.items():
            limits = ", ".join(f"{limit:.2f}" for limit in one.options.get("thresholds", ()))
            temperature = f"{one.options['temperature']:.3f}"
            lines.append((name, temperature, f"{one.before:.3f}", f"{one.after:.3f}", limits or "none"))
        yield markdown(lines)


def _usage(config: RunConfig, data: Mapping[str, TaskData]) -> str:
    if config.result == "trunk":
        return 'from transformers import AutoModel\n\ntrunk = AutoModel.from_pretrained("path/to/this/folder")'
    name = config.sealed[0]
    sample = data[name].kind.sample(data[name].options).model_dump(mode="json", exclude_none=True)
    asked = f"{json.dumps(name)}, [{json.dumps(sample, ensure_ascii=False)}]"
    return f'import mtserve\n\nengine = mtserve.load("path/to/this/folder")\nengine.predict({asked})'


def _sources(config: RunConfig, data: Mapping[str, TaskData]) -> Iterator[Line]:
    for name, of in data.items():
        licence, shown = config.tasks[name].license or "not stated", _shown(config, name)
        for which, split in of.splits.items():
            yield name, which, f"`{shown[which]}`", licence, f"`{split.sha256}`"


def _shown(config: RunConfig, name: str) -> dict[str, str]:
    """What the run file calls the source of each split of a task."""
    task = config.tasks[name]
    sources = {"train": task.train, "eval": task.eval, "test": task.test}
    return {which: source.shown for which, source in sources.items() if source is not None}


def _picture(title: str, name: str, figures: Collection[str]) -> str:
    return f"![{title}]({name})" if name in figures else ""


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=100)
