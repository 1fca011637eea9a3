"""A run file as data: YAML and `key=value` overrides to a checked RunConfig. Reads no examples and no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from mtserve.errors import ConfigError
from mtserve.manifest import KindName, TaskName
from mtserve.tasks import KINDS
from mtserve.tasks.base import AnyKind
from training.section import Section
from training.source import Source


class TaskConfig(Section):
    """One task: its kind, its data, and its share of the loss."""

    kind: KindName
    options: dict[str, Any] = Field(default={})
    train: Source
    eval: Source
    weight: float = Field(default=1.0, gt=0)
    batch_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fields_exist(self) -> TaskConfig:
        _among("option", self.options, self.handler.options)
        for source in (self.train, self.eval):
            _among("example field", source.columns, self.handler.labelled)
        return self

    @property
    def handler(self) -> AnyKind:
        return KINDS[self.kind]


class Training(Section):
    """How the weights are changed; batch sizes count examples, learning rates are those after the warm-up."""

    epochs: float = Field(default=3.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    bf16: bool = False
    logging_steps: int = Field(default=10, ge=1)


class RunConfig(Section):
    """A whole run. Data paths and a trunk's path are relative to the run file, `output` to the working directory."""

    trunk: str
    trunk_name: str | None = Field(default=None, description="What the card calls the trunk; by default its location.")
    output: str
    overwrite: bool = False
    seed: int = Field(default=0, ge=0)
    license: str | None = None
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    training: Training = Training()
    mixture: Literal["proportional"] = "proportional"
    on_bad_record: Literal["stop", "skip"] = "stop"
    golden_rows: int = Field(default=4, ge=0)
    calibration_rows: int = Field(default=200, ge=0)

    def batch_size(self, task: str) -> int:
        """Examples in a batch of one task."""
        return self.tasks[task].batch_size or self.training.batch_size


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file at `path` with `dotted.key=value` overrides, their values parsed as YAML. Raises ConfigError."""
    try:
        raw = _yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no mapping; a run file has the keys {', '.join(RunConfig.model_fields)}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
            raise ConfigError(f"{override!r} is no override; allowed: dotted.key=value")
        _put(raw, key, _yaml(value, override))
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from error


def _among(what: str, found: Mapping[str, Any], model: type[BaseModel]) -> None:
    for name in found:
        if name not in model.model_fields:
            raise ValueError(f"unknown {what} {name!r}; allowed: {', '.join(model.model_fields)}")


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Names may hold dots themselves, so of the keys that exist the longest match is taken."""
    node, parts = raw, key.split(".")
    while True:
        size = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
        name, parts = ".".join(parts[:size]), parts[size:]
        if not parts:
            node[name] = value
            return
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"{key} cannot be set: {name} is {node!r}, not a mapping")


def _first(error: ValidationError) -> str:
    """The first finding as one sentence: where, what is allowed, what was found."""
    found = error.errors(include_url=False)[0]
    where, message = ".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")
    shown = "" if found["type"] in ("value_error", "missing") else f"; found {found['input']!r:.80}"
    return f"{where + ': ' if where else ''}{message[:1].lower() + message[1:]}{shown}"
