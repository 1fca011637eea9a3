"""A run before its first step: trunk, data, fresh heads, losses. Trains nothing and writes nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtserve.backends.eager import EagerBackend
from mtserve.chains import Member
from mtserve.engine import Engine, Task
from mtserve.errors import ConfigError
from mtserve.model import Model
from mtserve.trunk import gguf_file
from training.config import RunConfig
from training.data.splits import TaskData, read_task
from training.pretraining import PRETRAINED, load_head
from training.special_tokens import add_special_tokens
from training.trainer.fit import TaskRun, check_best
from training.trainer.learner import Learned, has_dropout
from training.trainer.weighing import loss_terms
from training.trunk import Trunk, open_trunk


@dataclass(frozen=True)
class Prepared:
    """A run before its first step: the trunk with fresh heads, and the data."""

    trunk: Trunk
    data: dict[str, TaskData]
    model: Model
    runs: dict[str, TaskRun]
    engine: Engine


def prepare(config: RunConfig, *, base: Path) -> Prepared:
    """Trunk, data and fresh heads of a run. Raises SetupError."""
    torch.manual_seed(config.seed)  # a trunk's folder may lack a pooler, which is then made
    trunk = open_trunk(config.trunk, base, name=config.trunk_name, preparation=config.steps)
    if config.special_tokens:
        trunk = add_special_tokens(trunk, config.special_tokens, seed=config.seed)
    if config.preparations and config.steps is config.preparation:
        found = f"no preparation is named for {config.trunk}; named: {', '.join(config.preparations)}"
        _say(f"{found}. Its texts are prepared by {', '.join(config.preparation) or 'no step'}")
    data = _read(config, trunk, config.data_home(base))
    smoothing, runs = config.training.label_smoothing, {}
    if smoothing and not any("label_smoothing" in of.kind.loss_terms for of in data.values()):
        raise ConfigError("training.label_smoothing: no task here has a loss that can use it")
    for name, of in data.items():
        wanted = config.tasks[name]
        try:
            terms = loss_terms(
                of.kind,
                of.options,
                targets=(target for _, target in of.train.features) if wanted.class_weights else (),
                label_smoothing=smoothing if "label_smoothing" in of.kind.loss_terms else 0.0,
                class_weights=wanted.class_weights,
                r_drop=wanted.r_drop,
            )
        except ConfigError as error:
            raise ConfigError(f"tasks.{name}.{error}") from error
        learned = Learned(of.kind, of.options, terms)
        lengths = of.train.lengths if config.mixture.group_by_length else ()
        runs[name] = TaskRun(learned, of.train.features, wanted.weight, config.batch_size(name), lengths)
    _check_chains(config, trunk, data)
    regular = next((name for name, run in runs.items() if run.learned.terms.r_drop), None)
    if regular is not None and not has_dropout(trunk.model):
        found = f"{type(trunk.model).__name__} as it is configured has no dropout, so two passes are one"
        raise ConfigError(f"tasks.{regular}.r_drop: {found}; allowed: 0")
    measured = {n: list(of.kind.metrics(*_one(of), of.options)) for n, of in data.items()}
    check_best(config.training.best, measured)
    model = _model(trunk, data, seed=config.seed)
    tasks = [Task(name, of.kind, of.options) for name, of in data.items()]
    engine = Engine(tasks, EagerBackend(model, pad_id=trunk.spec.pad_id, follow=True), trunk.text())
    return Prepared(trunk, data, model, runs, engine)


def _check_chains(config: RunConfig, trunk: Trunk, data: Mapping[str, TaskData]) -> None:
    """Raise ConfigError for chains that do not go with their tasks: the run's, or those where new heads come to."""
    held = trunk.checkpoint.manifest if config.result == "heads" and trunk.checkpoint is not None else None
    members = {**({} if held is None else held.members), **{n: Member(of.kind, of.options) for n, of in data.items()}}
    try:
        for chain in config.chains.values() if held is None else held.chains:
            chain.check(members)
    except ValueError as error:
        raise ConfigError(f"chains: {error}") from error


def _one(data: TaskData) -> tuple[list[Any], list[Any]]:
    """One prediction and its example, to learn the names of a task's metrics."""
    return [data.kind.baseline(data.train.examples[:1], data.options)], [data.train.examples[0]]


def _read(config: RunConfig, trunk: Trunk, base: Path) -> dict[str, TaskData]:
    """Every task's data, checked against the trunk; what was left out is said on stderr."""
    text, data = trunk.text(), {}
    for name, task in config.tasks.items():
        data[name] = read_task(
            name,
            task,
            text,
            base=base,
            on_bad_record=config.on_bad_record,
            tokenizer_json=trunk.tokenizer_json,
            limit=config.limit,
        )
        trunk.check(name, task.handler, data[name].options)
        for which, split in data[name].splits.items():
            if bad := split.bad.messages:
                found = f"{len(bad)} of {len(bad) + len(split)} records left out; the first: {bad[0]}"
                _say(f"{name} {which}: {found}")
            if split.repairs:
                _say(f"{name} {which}: repaired {_counted(split.repairs)}")
    return data


def _say(line: str) -> None:
    """On stderr, by the first of several processes alone."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(line + "\n")


def _counted(repairs: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in repairs.items())


def _model(trunk: Trunk, data: Mapping[str, TaskData], *, seed: int) -> Model:
    """The trunk with fresh heads, in the order of the tasks, so that a seed gives the same weights again."""
    torch.manual_seed(seed)
    model = Model(trunk.model)
    for name, of in data.items():
        model.add(name, of.kind.head(of.options))
        if model.specs[name].architecture in PRETRAINED and model.head_tensors(name) and not gguf_file(trunk.folder):
            load_head(model, name, trunk.folder)  # what is tied to the trunk's embeddings came with it
    return model
