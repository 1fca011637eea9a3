"""A `MultitaskModel` as a checkpoint that mtserve serves. Knows no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mtserve
from mtserve.backends.eager import EagerBackend
from mtserve.checkpoint import Checkpoint
from mtserve.engine import Engine, Task
from mtserve.errors import ConfigError
from mtserve.golden import golden_rows
from mtserve.heads import StockHead
from mtserve.model import Model
from mtserve.sealing import seal
from mtserve.tasks import KINDS
from mtserve.text import Text, text_spec
from mtserve.weights import task_part, trunk_part
from training.stock.multitask import MultitaskModel


def to_checkpoint(
    model: MultitaskModel,
    folder: str | Path,
    tasks: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    tokenizer_json: str,
    source: str,
    golden: Mapping[str, Sequence[Any]] | None = None,
    card: str = "",
) -> Checkpoint:
    """Seal some tasks (name -> kind and options), with golden rows of the inputs in `golden`; sets evaluation mode.

    Serving makes rows by kind, options and tokenizer file: these must say what the training's features did, a token
    that ends every text (the tokenizer's template) and scores between 0 and 1 included. Raises ConfigError or
    CheckpointError if a kind needs another head than the task's, or names other labels.
    """
    model.settle()
    config = model.eval().config
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    spec = text_spec(tokenizer_json, pad_id=config.pad_token_id or 0, eos_id=end)
    served = Model(model.encoder).eval()
    made = [_served(model, served, name, kind=kind, options=raw) for name, (kind, raw) in tasks.items()]
    engine = Engine(made, EagerBackend(served, pad_id=spec.pad_id), Text(tokenizer_json, spec))
    parts = []
    for task in made:
        rows = golden_rows(engine, task.name, [task.kind.parse(item) for item in (golden or {}).get(task.name, ())])
        parts.append(task_part(served, task.name, kind=task.kind.name, options=task.options, golden=rows))
    return seal(
        Path(folder),
        trunk_part(served, source=source),
        tasks=parts,
        tokenizer_json=tokenizer_json,
        text=spec,
        provenance={},
        card=card,
        written_by=f"mtserve {mtserve.__version__}",
    )


def _served(model: MultitaskModel, served: Model, name: str, *, kind: str, options: Mapping[str, Any]) -> Task:
    """Put a task's head on the serving model."""
    stock = model.taskmodels_dict[name]
    parsed = KINDS[kind].options.model_validate(options)
    spec = KINDS[kind].head(parsed)
    head = served.add(name, spec, config=stock.config)
    if not isinstance(head, StockHead) or type(head.stock) is not type(stock):
        raise ConfigError(f"task {name!r} is a {type(stock).__name__}, which {kind} with these options does not use")
    named = [stock.config.id2label[index] for index in range(stock.config.num_labels)]
    if spec.labels and named != [f"LABEL_{index}" for index in range(len(named))] and named != list(spec.labels):
        raise ConfigError(f"task {name!r} was trained on the labels {named}; the options have {list(spec.labels)}")
    tied, state = served.tied(name), stock.state_dict()
    served.load_head(name, {key: state[key] for key in served.head_state(name) if key not in tied}, tied)
    return Task(name, KINDS[kind], parsed)
