"""Special tokens that a run adds to its trunk: in the tokenizer, in the embeddings, in what ends and pads a row.

Knows no task. Templates and `append` of the tasks name them like any other token of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch
from tokenizers import Tokenizer

from training.trunk import Trunk

Role = Literal["bos", "eos", "pad", "cls"]
PRESETS: Mapping[str, Mapping[Role, str]] = MappingProxyType(
    {"notebook": MappingProxyType({"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "cls": "<cls>"})}
)
"""`notebook`: those of "Multi-task Training with Hugging Face Transformers and NLP", in its order of ids."""


def add_special_tokens(trunk: Trunk, tokens: Mapping[Role, str], *, seed: int) -> Trunk:
    """The trunk with these tokens, which take the next free ids in the order given; those that it has stay.

    A new token's embedding is drawn around the mean of all others (Hewitt, 2021), by `seed`. The ids of `eos` and `pad`
    become those of the text spec and of the trunk's config.
    """
    tokenizer = Tokenizer.from_str(trunk.tokenizer_json)
    tokenizer.add_special_tokens(list(tokens.values()))
    ids = {role: tokenizer.token_to_id(token) for role, token in tokens.items()}
    model, size = trunk.model, tokenizer.get_vocab_size(with_added_tokens=True)
    if size > model.get_input_embeddings().weight.shape[0]:
        torch.manual_seed(seed)
        model.resize_token_embeddings(size)
    for role in ("bos", "eos", "pad"):
        if role in ids:
            setattr(model.config, f"{role}_token_id", ids[role])
    of_text = {f"{role}_id": ids[role] for role in ("eos", "pad") if role in ids}
    return replace(trunk, tokenizer_json=str(tokenizer.to_str()), spec=trunk.spec.model_copy(update=of_text))
