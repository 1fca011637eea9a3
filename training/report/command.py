"""`python -m training evaluate`: a sealed checkpoint, or the untrained trunk, measured on the data of a run file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.loading import load_checkpoint
from mtserve.resolve import resolve
from training.config import RunConfig, Training
from training.data.splits import TaskData, read_task
from training.prepare import prepare
from training.report.answers import answers, examples_of, prompted
from training.report.beside import beside
from training.report.evaluate import scored, signed, table
from training.report.tables import aligned


def measured(
    config: RunConfig,
    checkpoint: str | None,
    *,
    base: Path,
    split: str = "eval",
    parameters: Mapping[str, Any] | None = None,
    predictions: Path | None = None,
) -> list[str]:
    """Lines of a table with every metric of each task of the run file that the checkpoint has, and what they were
    measured with.

    checkpoint    None stands for the run's trunk before training, and for the tasks with a `zero_shot` template
    parameters    of a request, for the tasks whose kind knows them all
    predictions   a file of JSON lines to write: task, example and prediction

    Raises SetupError.
    """
    if predictions is not None and not predictions.parent.is_dir():
        raise ConfigError(f"{predictions} cannot be written: {predictions.parent} is no folder")
    tasks = _untrained(config, base) if checkpoint is None else sealed(config, base, checkpoint)
    asked = dict(parameters or {})
    knowing = [name for name, (_, of) in tasks.items() if asked.keys() <= of.kind.parameters.model_fields.keys()]
    if not knowing:
        raise ConfigError(f"parameters: no task here knows all of {', '.join(asked)}")
    others = beside(config, {name: of for name, (_, of) in tasks.items()}, base=base)
    scores, lines = {}, []
    for name, (engine, of) in tasks.items():
        given = answers(engine, name, of, split=split, parameters=asked if name in knowing else None)
        scores[name] = scored(given, name, of, split=split, resamples=config.resamples, beside=others[name])
        lines += _records(name, examples_of(name, of, split), given)
    if predictions is not None:
        predictions.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    sizes = ", ".join(f"{name} {one.examples}" for name, one in scores.items())
    return [*aligned(table(scores, all_metrics=True)), f"examples of {split}: {sizes}", *signed(scores)]


def sealed(config: RunConfig, base: Path, location: str) -> dict[str, tuple[Engine, TaskData]]:
    """The checkpoint's tasks with the run file's data, under the options that the checkpoint has. Raises
    SetupError."""
    checkpoint = Checkpoint.open(resolve(location))
    engine, found = load_checkpoint(checkpoint), {}
    for name, task in config.tasks.items():
        if name not in engine.tasks:
            sys.stderr.write(f"{name} is no task of {location}: left out\n")
            continue
        held = engine.tasks[name]
        if held.kind.name != task.kind:
            raise ConfigError(f"tasks.{name}.kind: {task.kind}; in {location} it is {held.kind.name}")
        data = read_task(
            name,
            task.model_copy(update={"options": held.options.model_dump(mode="json")}),
            engine.text,
            base=config.data_home(base),
            on_bad_record=config.on_bad_record,
            tokenizer_json=checkpoint.tokenizer_json,
            limit=config.limit,
        )
        found[name] = engine, data
    if not found:
        raise ConfigError(f"{location} has none of the run file's tasks; it has {', '.join(engine.tasks)}")
    return found


def _untrained(config: RunConfig, base: Path) -> dict[str, tuple[Engine, TaskData]]:
    """The tasks that have a template for the trunk as it was pretrained."""
    templates = {name: t for name, task in config.tasks.items() if (t := task.zero_shot) is not None}
    if not templates:
        raise ConfigError("no task of the run file has a zero_shot template")
    tasks = {name: config.tasks[name] for name in templates}
    run = prepare(config.model_copy(update={"tasks": tasks, "training": Training()}), base=base)
    return {n: (prompted(run.engine, n, run.data[n], template), run.data[n]) for n, template in templates.items()}


def _records(name: str, examples: Sequence[Any], predictions: Sequence[Any]) -> list[str]:
    made = []
    for example, prediction in zip(examples, predictions, strict=True):
        record = {"task": name, **example.model_dump(mode="json", exclude_none=True), "prediction": prediction}
        made.append(json.dumps(record, ensure_ascii=False))
    return made
