"""A trunk and what its family allows: loading, longest row, causality. Knows no heads and no text."""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModel, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from mtserve.errors import CheckpointError, SetupError


def hidden_size(config: PretrainedConfig) -> int:
    return int(config.hidden_size)


def max_length(config: PretrainedConfig) -> int | None:
    """Most tokens of a row that a trunk's positions allow; None where they set no limit.

    RoBERTa and its kin count positions from pad id + 1, and so have fewer than their table has entries.
    """
    size = getattr(config, "max_position_embeddings", None)
    return None if size is None else int(size) - first_position(config)


OFFSET_FAMILIES = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}
)
WORD_TYPE_FAMILIES = frozenset({"codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt"})
"""Families that look a type id up among the words, so that type 0 would add a word's embedding too."""


def first_position(config: PretrainedConfig) -> int:
    """The position id of a row's first token."""
    return int(config.pad_token_id) + 1 if config.model_type in OFFSET_FAMILIES else 0


def accepted(trunk: PreTrainedModel) -> frozenset[str]:
    """Names of what a trunk takes."""
    return _parameters(type(trunk).forward)


@lru_cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def inputs_of(trunk: PreTrainedModel, ids: Tensor, type_ids: Tensor) -> dict[str, Any]:
    """What a trunk is given for (rows, seq) ids and type ids, but for masks and positions.

    Type id 0 adds nothing where types share the words' embeddings, and any other adds the embedding of that id.
    """
    config, inputs = trunk.config, dict[str, Any]()
    if config.model_type in WORD_TYPE_FAMILIES and type_ids.any():
        words = trunk.get_input_embeddings()
        inputs["inputs_embeds"] = words(ids) + words(type_ids) * (type_ids > 0)[:, :, None]
    else:
        inputs["input_ids"] = ids
    if "token_type_ids" in accepted(trunk) and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = type_ids
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def is_causal(trunk: PreTrainedModel) -> bool:
    """Whether no position sees a later one, found by changing the last of some tokens."""
    was_training = trunk.training
    trunk.eval()
    ids = torch.arange(4, 10, device=trunk.device)[None] % trunk.config.vocab_size
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


def gguf_file(location: Path) -> Path | None:
    """The GGUF file that stands for a trunk: the location itself, or the only one in a folder without a config."""
    if location.is_file():
        return location if location.suffix == ".gguf" else None
    found = list(location.glob("*.gguf"))
    return found[0] if len(found) == 1 and not (location / "config.json").is_file() else None


def load_trunk(location: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A trunk from a folder that holds a Transformers model or task model, with its pooler where the family has one;
    or from a GGUF file (see `gguf_file`), whose packed weights become dense ones.

    Raises CheckpointError if there is no usable config or no safetensors weights, SetupError for a GGUF file without
    the package that reads it.
    """
    packed, folder, form = gguf_file(Path(location)), location, dict[str, Any](use_safetensors=True)
    if packed is not None:
        if find_spec("gguf") is None:
            raise SetupError(f"{packed} is read by the gguf package, which is not installed: pip install gguf")
        folder = str(packed.parent)
        form = {"gguf_file": packed.name, "quantization_config": GgufConfig(dequantize=True)}
    try:
        with no_progress_bars():
            trunk, report = AutoModel.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True, **form
            )
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(f"{location} cannot be loaded as a trunk: {error}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise CheckpointError(f"{location}: {len(missing)} trunk tensors are missing, the first is {missing[0]}")
    trunk.eval()
    return cast("PreTrainedModel", trunk)
