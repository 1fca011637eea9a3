"""A `MultitaskModel` as a checkpoint that mtserve serves. Knows no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtserve.checkpoint import Checkpoint
from mtserve.interop.assemble import put_stock, seal_tasks, task_options
from mtserve.model import Model
from mtserve.text import text_spec
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
    served = Model(model.encoder).eval()
    made = []
    for name, (kind, raw) in tasks.items():
        chosen = task_options(name, kind, raw)
        made.append(put_stock(served, name, kind=kind, options=chosen, stock=model.taskmodels_dict[name]))
    return seal_tasks(
        Path(folder),
        served,
        tasks=made,
        golden=golden or {},
        tokenizer_json=tokenizer_json,
        text=text_spec(tokenizer_json, pad_id=config.pad_token_id or 0, eos_id=end),
        source=source,
        card=card,
    )
