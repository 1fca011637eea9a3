"""How the tokens of an answer are chosen, from logits in numpy arrays. Knows no trunk, tokenizer, template, engine."""

from __future__ import annotations

from collections.abc import Callable

from mtserve.rows import Ints
from mtserve.tasks.decoding.beam import BeamSearch
from mtserve.tasks.decoding.independent import Independent
from mtserve.tasks.decoding.parameters import Decoding, GenerationParameters
from mtserve.tasks.decoding.search import Answer, Move, Search
from mtserve.tasks.decoding.stops import Reader

__all__ = ["Answer", "Decoding", "GenerationParameters", "Move", "Reader", "Search", "make_search"]


def make_search(
    decoding: Decoding, *, prompt: Ints, end: int | None, decode: Callable[[list[int]], str], logprobs: bool = False
) -> Search:
    """The search that these values ask for.

    prompt: (len,) ids that the answer follows. end: the token that ends an answer, if any does.
    decode: text of token ids. logprobs: keep the log-probability of each token of the answer.
    """
    kind = BeamSearch if decoding.num_beams > 1 else Independent
    return kind(decoding, prompt, end, decode, logprobs)
