"""Sequences that know nothing of each other: greedy, sampling, and greedy that checks guesses. Knows no trunk."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mtserve.rows import Floats, Ints
from mtserve.tasks.decoding.processors import best, draw, log_softmax
from mtserve.tasks.decoding.search import Line, Move, Search

_LONGEST_MATCH = 3


class Independent(Search):
    """One sequence, or several with random draws of their own, so that none depends on what runs beside it."""

    def __post_init__(self) -> None:
        numbers = range(self.decoding.num_return_sequences)
        self._counts = self.keep_logprobs or self.decoding.output_scores or len(numbers) > 1
        self._lines = [Line(self.prompt) for _ in numbers]
        self._guesses: list[tuple[int, ...]] = [() for _ in numbers]
        seeds = [None if self.decoding.seed is None else (self.decoding.seed, number) for number in numbers]
        self._draws = [np.random.default_rng(seed) for seed in seeds]
        self._live: list[int] = []

    def advance(self, logits: Sequence[Floats]) -> list[Move]:
        numbers = self._live or list(range(len(self._lines)))
        if not self._live:
            logits = [logits[0] for _ in numbers]
        moves, live = [], []
        for at, (number, rows) in enumerate(zip(numbers, logits, strict=True)):
            known = len(self._lines[number].tokens)
            line = self._lines[number] = self._checked(number, rows)
            if line.finish_reason is None:
                self._guesses[number] = self._guess(line)
                moves.append(Move(at if self._live else 0, line.tokens[known:], self._guesses[number]))
                live.append(number)
        self._live = live
        return moves

    def _checked(self, number: int, rows: Floats) -> Line:
        """A line with the tokens that (1 + guesses, vocab) logits add: a guess is right if it is what is chosen."""
        line = self._lines[number]
        for row, guess in zip(rows, (*self._guesses[number], None), strict=True):
            scores = self._scores(row, line)
            token = draw(scores, self._draws[number]) if self.decoding.do_sample else best(scores)
            line = self._grown(line, token, float(log_softmax(scores)[token]) if self._counts else nan)
            if token != guess or line.finish_reason:
                break
        return line

    def _guess(self, line: Line) -> tuple[int, ...]:
        wanted = self.decoding.prompt_lookup_num_tokens or 0
        return lookup(line.ids, min(wanted, self.decoding.max_new_tokens - len(line.tokens) - 1), self.end)

    def _ranked(self) -> list[Line]:
        if len(self._lines) > 1 and any(line.finish_reason is None for line in self._lines):
            return []
        return sorted(self._lines, key=lambda line: -line.score)


def lookup(ids: Ints, most: int, end: int | None) -> tuple[int, ...]:
    """The tokens, at most `most`, that followed the latest earlier occurrence of the last three ids, else of the last
    two, else of the last; up to an end token.

    Prompt-lookup decoding (Saxena, 2023): much of an answer may stand in its prompt.
    """
    for size in range(min(_LONGEST_MATCH, len(ids) - 1), 0, -1) if most > 0 else ():
        found = np.flatnonzero((sliding_window_view(ids[:-1], size) == ids[-size:]).all(axis=1))
        if len(found):
            start = int(found[-1]) + size
            guesses: list[int] = ids[start : start + most].tolist()
            return tuple(guesses[: guesses.index(end)] if end in guesses else guesses)
    return ()
