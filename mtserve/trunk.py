"""A trunk and what its family allows: loading, longest row, causality. Knows no heads and no text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from mtserve.errors import CheckpointError


def hidden_size(config: PretrainedConfig) -> int:
    return int(config.hidden_size)


def max_length(config: PretrainedConfig) -> int | None:
    """Most tokens of a row that a trunk's positions allow; None where they set no limit.

    RoBERTa and its kin count positions from pad id + 1, and so have fewer than their table has entries.
    """
    size = getattr(config, "max_position_embeddings", None)
    offset = config.pad_token_id + 1 if config.model_type in OFFSET_FAMILIES else 0
    return None if size is None else int(size) - offset


OFFSET_FAMILIES = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}
)


def is_causal(trunk: PreTrainedModel) -> bool:
    """Whether no position sees a later one, found by changing the last of some tokens."""
    was_training = trunk.training
    trunk.eval()
    ids = torch.arange(4, 10)[None] % trunk.config.vocab_size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % trunk.config.vocab_size
    with torch.no_grad():
        before, after = (trunk(input_ids=i).last_hidden_state[0, :-1] for i in (ids, other))
    trunk.train(was_training)
    return torch.equal(before, after)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Loading and saving a model without Transformers' progress bars, which are left as they were afterwards."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_trunk(folder: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A trunk from a folder that holds a Transformers model or task model, with its pooler where the family has one.

    Raises CheckpointError if the folder holds no usable config or no safetensors weights.
    """
    try:
        with no_progress_bars():
            trunk, report = AutoModel.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a trunk: {error}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} trunk tensors are missing, the first is {missing[0]}")
    trunk.eval()
    return cast("PreTrainedModel", trunk)
