"""Drives a search with a whole stock model: what the engine and its backends do, without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from mtserve.tasks.decoding import Answer, Decoding, Move, Search, make_search
from tests.tiny import EOS, FAMILIES, TOKENIZER_JSON

TOKENIZER = Tokenizer.from_str(TOKENIZER_JSON)
PROMPTS = [
    TOKENIZER.encode(text, add_special_tokens=False).ids
    for text in ["one", "the parcel arrived two days late", "good bad fine good bad", "what do you open ?"]
]
Forward = Callable[[list[list[int]]], list[np.ndarray]]


@cache
def model(family: str, seed: int = 0) -> Any:
    """A random model whose weights are spread widely enough that prompts lead to different answers, of all lengths."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" not in name and "wte" not in name else 1.0)
    made.generation_config.eos_token_id = EOS
    return made


def forward(family: str, *, bias: float = 0.0, seed: int = 0) -> Forward:
    """(len, vocab) logits of sequences of one length; `bias` is added to the end token's."""

    def run(sequences: list[list[int]]) -> list[np.ndarray]:
        with torch.inference_mode():
            logits = model(family, seed)(torch.tensor(sequences)).logits
            logits[..., EOS] += bias
        return list(logits.numpy())

    return run


def words(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def drive(
    run: Forward,
    prompt: list[int],
    *,
    decode: Callable[[list[int]], str] = words,
    watch: Callable[[Search], None] = lambda _: None,
    logprobs: bool = False,
    moves_of: list[list[Move]] | None = None,
    **values: Any,
) -> Search:
    """A finished search; `watch` sees it after each step, `moves_of` collects what it wanted."""
    decoding = Decoding(**{"max_new_tokens": 8, **values})
    search = make_search(decoding, prompt=np.array(prompt, np.int32), end=EOS, decode=decode, logprobs=logprobs)
    moves, sequences = search.advance([run([prompt])[0][-1:]]), [prompt]
    watch(search)
    while moves:
        if moves_of is not None:
            moves_of.append(moves)
        assert len(moves) <= decoding.sequences
        sequences = [sequences[move.parent] + list(move.tokens) for move in moves]
        asked = [ids + list(move.guesses) for ids, move in zip(sequences, moves, strict=True)]
        logits = [rows[-1 - len(move.guesses) :] for rows, move in zip(run(asked), moves, strict=True)]
        moves = search.advance(logits)
        watch(search)
    return search


def answers(run: Forward, prompt: list[int], **values: Any) -> list[Answer]:
    return drive(run, prompt, **values).answers
