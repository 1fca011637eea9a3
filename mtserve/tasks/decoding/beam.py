"""Beam search, equal to that of Transformers' `generate` for one prompt. Knows no trunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mtserve.rows import Floats
from mtserve.tasks.decoding.processors import log_softmax
from mtserve.tasks.decoding.search import Line, Move, Search


class BeamSearch(Search):
    """The likeliest of many sequences.

    In each step the best 2 x `num_beams` continuations are looked at: those of the first half that end compete to be
    answers, the best of the others go on. The search is over when no beam goes on, or when there are as many answers as
    beams and the best beam, scored at its length now, is not better than the worst of them (`early_stopping`: at once).
    """

    def __post_init__(self) -> None:
        self._live = [Line(self.prompt)]
        self._ended: list[Line] = []

    def advance(self, logits: Sequence[Floats]) -> list[Move]:
        width = self.decoding.num_beams
        penalty = (len(self._live[0].tokens) + 1) ** self.decoding.length_penalty
        found = self._continuations(logits)
        ended = [replace(line, score=line.score / penalty) for _, line in found[:width] if line.finish_reason]
        self._ended = sorted(self._ended + ended, key=lambda line: -line.score)[:width]
        live = [(parent, line) for parent, line in found if not line.finish_reason][:width]
        if live and len(self._ended) == width:
            hopeless = live[0][1].score / penalty <= self._ended[-1].score
            live = [] if hopeless or self.decoding.early_stopping else live
        self._live = [line for _, line in live]
        return [Move(parent, line.tokens[-1:]) for parent, line in live]

    def _continuations(self, logits: Sequence[Floats]) -> list[tuple[int, Line]]:
        """(parent, line) of the best continuations of all beams by one token, best first."""
        number = 2 * self.decoding.num_beams
        found = []
        for parent, (line, rows) in enumerate(zip(self._live, logits, strict=True)):
            scores = self._scores(log_softmax(rows[-1]), line)
            top = np.argpartition(scores, -number)[-number:] if number < len(scores) else np.arange(len(scores))
            found += [(line.score + float(scores[token]), parent, int(token)) for token in top]
        found = sorted((-score, parent, token) for score, parent, token in found if np.isfinite(score))[:number]
        if not found:
            raise FloatingPointError("no token can be chosen: the parameters forbid every one")
        lines = self._live
        return [(at, self._grown(lines[at], token, -score - lines[at].score)) for score, at, token in found]

    def _ranked(self) -> list[Line]:
        return [] if self._live else self._ended[: self.decoding.num_return_sequences]
