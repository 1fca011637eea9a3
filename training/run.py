"""A run from its config to a sealed checkpoint: trunk, data, heads, training, evaluation, seal."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mtserve
from mtserve.backends.eager import EagerBackend
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine, Task
from mtserve.errors import ConfigError
from mtserve.golden import golden_rows
from mtserve.manifest import MANIFEST
from mtserve.model import Model
from mtserve.sealing import TaskPart, seal
from mtserve.trunk import hidden_size
from mtserve.weights import task_part, trunk_part
from training.card import card
from training.config import RunConfig
from training.evaluate import Scores, evaluate
from training.examples import Split, TaskData, read_task
from training.trainer import TaskRun, Trained, fit
from training.trunk import Trunk, open_trunk

_VERSIONS = ("torch", "transformers", "tokenizers", "datasets")


@dataclass(frozen=True)
class Result:
    """A finished run: the sealed checkpoint, the engine over the model as it was sealed, and how well it does."""

    checkpoint: Checkpoint
    engine: Engine
    scores: dict[str, Scores]
    trained: Trained


def train(config: RunConfig, *, base: Path, command: str = "") -> Result:
    """Train and seal what `config` describes; `base` is the run file's folder, `command` goes into the card.

    Raises SetupError (ConfigError, ResolveError, CheckpointError); nothing is written then.
    """
    output = Path(config.output)
    _check_output(output, overwrite=config.overwrite)
    torch.manual_seed(config.seed)  # a trunk's folder may lack a pooler, which is then made
    trunk = open_trunk(config.trunk, base, name=config.trunk_name)
    _check_same_trunk(output, trunk)
    data = _read(config, trunk, base)
    model = _model(trunk, data, seed=config.seed)
    runs = {
        name: TaskRun(of.kind, of.options, of.features, config.tasks[name].weight, config.batch_size(name))
        for name, of in data.items()
    }
    trained = fit(model, runs, settings=config.training, seed=config.seed, pad_id=trunk.spec.pad_id)
    tasks = [Task(name, of.kind, of.options) for name, of in data.items()]
    engine = Engine(tasks, EagerBackend(model, pad_id=trunk.spec.pad_id), trunk.text())
    scores = {name: evaluate(engine, name, of) for name, of in data.items()}
    checkpoint = seal(
        output,
        trunk_part(model, source=trunk.source),
        tasks=[_part(config, model, engine, name=name, data=of, scores=scores[name]) for name, of in data.items()],
        tokenizer_json=trunk.tokenizer_json,
        text=trunk.spec,
        provenance=_provenance(config, data, scores=scores, trained=trained, command=command),
        card=card(config, data, scores=scores, source=trunk.source, command=command, versions=_versions()),
        written_by=f"mtserve {mtserve.__version__}",
    )
    return Result(checkpoint, engine, scores, trained)


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse before training what sealing would refuse after it."""
    if (output / MANIFEST).exists():
        if not overwrite:
            raise ConfigError(f"{output} already holds a checkpoint; allowed: another output, or overwrite: true")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} holds something that is no checkpoint; allowed: a new or empty folder")
    home = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not os.access(home, os.W_OK):
        raise ConfigError(f"{output} cannot be written: no permission in {home}")


def _check_same_trunk(output: Path, trunk: Trunk) -> None:
    """A checkpoint folder keeps its tokenizer and its trunk's shape for life."""
    if (output / MANIFEST).exists():
        held = Checkpoint.open(output)
        shape = (trunk.model.config.model_type, hidden_size(trunk.model.config))
        if (
            held.tokenizer_json != trunk.tokenizer_json
            or (held.manifest.trunk.family, held.manifest.trunk.hidden_size) != shape
        ):
            found = f"{held.manifest.trunk.source} ({held.manifest.trunk.family})"
            raise ConfigError(f"{output} holds a checkpoint of another trunk, {found}; allowed: another output")


def _read(config: RunConfig, trunk: Trunk, base: Path) -> dict[str, TaskData]:
    """Every task's data, checked against the trunk; what was left out is said on stderr."""
    text, data = trunk.text(), {}
    for name, task in config.tasks.items():
        data[name] = read_task(name, task, text, base=base, on_bad_record=config.on_bad_record)
        trunk.check(name, task.handler, data[name].options)
        for which, split in (("train", data[name].train), ("eval", data[name].eval)):
            if bad := split.bad.messages:
                found = f"{len(bad)} of {len(bad) + len(split)} records left out; the first: {bad[0]}"
                sys.stderr.write(f"{name} {which}: {found}\n")
    return data


def _model(trunk: Trunk, data: Mapping[str, TaskData], *, seed: int) -> Model:
    """The trunk with fresh heads, in the order of the tasks, so that a seed gives the same weights again."""
    torch.manual_seed(seed)
    model = Model(trunk.model)
    for name, of in data.items():
        model.add(name, of.kind.head(of.options))
    return model


def _part(config: RunConfig, model: Model, engine: Engine, *, name: str, data: TaskData, scores: Scores) -> TaskPart:
    examples = data.eval.examples
    golden = [data.kind.unlabelled(example) for example in examples[: config.golden_rows]]
    labelled = [e.model_dump(mode="json", exclude_none=True) for e in examples[: config.calibration_rows]]
    return task_part(
        model,
        name,
        kind=data.kind.name,
        options=data.options,
        golden=golden_rows(engine, name, golden),
        calibration=labelled,
        metrics=scores.metrics,
    )


def _provenance(
    config: RunConfig, data: Mapping[str, TaskData], *, scores: Mapping[str, Scores], trained: Trained, command: str
) -> dict[str, Any]:
    def of(split: Split) -> dict[str, Any]:
        return {"sha256": split.sha256, "rows": len(split), "left_out": len(split.bad.messages)}

    return {
        "config": config.model_dump(mode="json"),
        "command": command,
        "data": {name: {"train": of(task.train), "eval": of(task.eval)} for name, task in data.items()},
        "metrics": {name: found.metrics for name, found in scores.items()},
        "baselines": {name: found.baseline for name, found in scores.items()},
        "training": {"steps": trained.steps, "seconds": round(trained.seconds, 1), "tokens": trained.tokens},
        "log": trained.log,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "mtserve": mtserve.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _VERSIONS},
    }
