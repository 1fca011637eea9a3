"""A torch model to and from a checkpoint's files. Knows no engine and no text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PretrainedConfig

from mtserve.checkpoint import Checkpoint
from mtserve.errors import CheckpointError
from mtserve.head_file import HeadFile
from mtserve.manifest import GoldenRow, TaskEntry, check_kind
from mtserve.model import Model
from mtserve.sealing import TaskPart, TrunkPart
from mtserve.tasks import KINDS
from mtserve.tasks.base import Options
from mtserve.trunk import hidden_size, is_causal, max_length, no_progress_bars


def load_model(checkpoint: Checkpoint) -> Model:
    """The checkpoint's trunk with all its heads, in fp32, each trunk tensor once in memory.

    Raises CheckpointError if tensors are missing, left over or of a wrong shape.
    """
    checkpoint.check_torch("loading it into PyTorch")
    manifest = checkpoint.manifest
    config = _config(checkpoint.folder / "trunk/config.json")
    state = load_file(checkpoint.folder / manifest.trunk.weights)
    family = AutoModel._model_mapping[type(config)]
    with no_progress_bars():
        trunk, report = family.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            first = sorted(map(str, report[fault]))[0]
            raise CheckpointError(f"{checkpoint.folder}: trunk weights do not fit their config: {fault[:-5]} {first}")
    model = Model(trunk.eval())
    add_heads(model, checkpoint)
    return model.eval()


def add_heads(model: Model, checkpoint: Checkpoint) -> None:
    """Put the heads of a checkpoint on a model of the same trunk. Raises CheckpointError as `load_model`."""
    for task in checkpoint.manifest.tasks:
        own = None if task.config is None else _config(checkpoint.folder / task.config)
        tensors = load_file(checkpoint.folder / task.weights) if task.weights else {}
        put_head(model, task.name, task, own, tensors)


def add_sent_head(model: Model, key: str, head: HeadFile) -> None:
    """Put a head that was sent on a model of its trunk, or leave the model as it was. Raises CheckpointError."""
    own = None if head.config is None else _checked_config(head.config, f"the config of task {head.entry.name!r}")
    try:
        put_head(model, key, head.entry, own, load_file(head.path))
    except Exception:
        if key in model.specs:
            model.remove(key)
        raise


def put_head(
    model: Model, key: str, entry: TaskEntry, config: PretrainedConfig | None, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Make the head of a task, on the trunk's device, and fill it. Raises CheckpointError where tensors do not fit."""
    head = model.add(key, entry.handler.head(entry.parsed_options), config=config)
    model.load_head(key, tensors, entry.tied)
    head.to(model.trunk.device)


def _config(path: Path) -> PretrainedConfig:
    """A Transformers config from its file. Raises CheckpointError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no model config: {error}") from error
    return _checked_config(raw, str(path))


def _checked_config(raw: Any, of: str) -> PretrainedConfig:
    try:
        rest = dict(raw)
        return AutoConfig.for_model(rest.pop("model_type"), **rest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{of} is no model config: {error}") from error


def trunk_part(model: Model, *, source: str) -> TrunkPart:
    """The model's trunk, ready to be sealed. `source` says where it came from (a hub id, a folder's name)."""
    trunk = model.trunk

    def write(folder: Path) -> None:
        with no_progress_bars():
            trunk.save_pretrained(folder, max_shard_size="1000GB")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("transformers_version", None)  # so that another version of the folder can be written after an update
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")

    return TrunkPart(
        write=write,
        family=trunk.config.model_type,
        causal=is_causal(trunk),
        hidden_size=hidden_size(trunk.config),
        max_length=max_length(trunk.config),
        source=source,
    )


def task_part(
    model: Model,
    name: str,
    *,
    kind: str,
    options: Options,
    golden: Sequence[GoldenRow] = (),
    calibration: Sequence[Mapping[str, Any]] = (),
    metrics: Mapping[str, float] | None = None,
) -> TaskPart:
    """One task of the model, ready to be sealed; tensors tied to the trunk are named, not stored, and the options say
    which state the head reads."""
    tensors, config = model.head_tensors(name), model.head(name).config
    return TaskPart(
        name=name,
        kind=check_kind(kind),
        options=KINDS[kind].stated(options, model.head(name).reads),
        write=partial(_save, tensors) if tensors else None,
        config=None if config is None else json.loads(config.to_json_string(use_diff=True)),
        tied=model.tied(name),
        golden=golden,
        calibration=calibration,
        metrics=metrics or {},
    )


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
