"""A search goes from logits to tokens, step by step. Knows no trunk: others compute the logits that it asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mtserve.rows import Floats, Ints
from mtserve.tasks.decoding.parameters import Decoding
from mtserve.tasks.decoding.processors import processed
from mtserve.tasks.decoding.stops import until_stop

FinishReason = Literal["eos_token", "length", "stop_sequence"]


@dataclass(frozen=True)
class Move:
    """How one sequence goes on: from which of the last step's sequences, with which accepted tokens (one at least),
    and which guesses behind them the next pass is to check."""

    parent: int
    tokens: tuple[int, ...]
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A finished sequence.

    tokens   without the end token; those of a stop string are among them
    text     up to the stop string, if one ended it
    score    sum of the log-probabilities of all tokens, the end token included; with beams, over the length to the
             power of the length penalty; NaN where nobody asked for it
    """

    tokens: tuple[int, ...]
    text: str
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True, eq=False)
class Line:
    """A sequence as it grows: `ids` are prompt and answer, `tokens` the answer without an end token, `logprobs` those
    of all its tokens, `score` is their sum."""

    ids: Ints
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Search(ABC):
    """The state of one generation. What can be read along is that of a single sequence; of several the best one is
    known, and there to be read, only at the end. Fields are as in `make_search`."""

    decoding: Decoding
    prompt: Ints
    end: int | None
    decode: Callable[[list[int]], str]
    keep_logprobs: bool

    @abstractmethod
    def __post_init__(self) -> None:
        """Make the sequences that the search starts from."""

    @abstractmethod
    def advance(self, logits: Sequence[Floats]) -> list[Move]:
        """Choose the next tokens; no moves means that all is done.

        logits: (1 + guesses, vocab) for each of the moves returned last, in their order; at first for the prompt alone,
        (1, vocab). Raises FloatingPointError where they allow no choice.
        """

    @abstractmethod
    def _ranked(self) -> list[Line]:
        """All that is known of the answers, best first."""

    @property
    def answers(self) -> list[Answer]:
        """Best first, after the end."""
        return [
            Answer(line.tokens, self._text(line.tokens)[0], line.score, line.finish_reason)
            for line in self._ranked()
            if line.finish_reason
        ]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Accepted so far, without the end token."""
        return next((line.tokens for line in self._ranked()), ())

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of `tokens`, and of the end token behind them; empty unless they were asked for."""
        known = self._ranked() if self.keep_logprobs else []
        return next((line.logprobs for line in known), ())

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs."""
        return next((line.finish_reason for line in self._ranked()), None)

    def _text(self, tokens: Sequence[int]) -> tuple[str, bool]:
        return until_stop(self.decode(list(tokens)), self.decoding.stop_strings)

    def _scores(self, logits: Floats, line: Line) -> Floats:
        """(vocab,) logits of the token after a line, as the parameters change them."""
        return processed(logits, line.ids, self.decoding, made=len(line.tokens), end=self.end)

    def _grown(self, line: Line, token: int, logprob: float) -> Line:
        """A line with one more token, and whether that ends it."""
        line = replace(line, logprobs=(*line.logprobs, logprob), score=line.score + logprob)
        if token == self.end:
            return replace(line, finish_reason="eos_token")
        tokens = (*line.tokens, token)
        reason: FinishReason | None = "length" if len(tokens) == self.decoding.max_new_tokens else None
        if self.decoding.stop_strings and self._text(tokens)[1]:
            reason = "stop_sequence"
        return replace(line, ids=np.append(line.ids, np.int32(token)), tokens=tokens, finish_reason=reason)
