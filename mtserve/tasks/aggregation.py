"""Token scores to spans, by the aggregation strategies that users of Transformers know. Knows no rows and no head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from mtserve.rows import Floats
from mtserve.tasks.spans import tags_to_spans


class SpanScore(TypedDict):
    """A span, or with `aggregation_strategy` none a token. For words, `start` and `end` count words."""

    score: float
    word: str
    start: int
    end: int
    entity_group: NotRequired[str]
    entity: NotRequired[str]
    index: NotRequired[int]


def trimmed(source: str, start: int, end: int) -> tuple[int, int]:
    """A token's characters without the spaces around them, which some tokenizers count to a token."""
    piece = source[start:end]
    return start + len(piece) - len(piece.lstrip()), max(start, end - (len(piece) - len(piece.rstrip())))


def by_word(
    scores: Floats, owners: Sequence[int], words: Sequence[tuple[int, int]], strategy: str
) -> tuple[Floats, list[tuple[int, int]]]:
    """(words, n_out) scores and the character limits of the words that have a token."""
    tokens_of: dict[int, list[int]] = {}
    for token, word in enumerate(owners):
        if word >= 0:
            tokens_of.setdefault(word, []).append(token)
    merged = []
    for tokens in tokens_of.values():
        block = scores[tokens]  # (tokens of the word, n_out)
        if strategy == "first":
            merged.append(block[0])
        elif strategy == "average":
            merged.append(block.mean(axis=0))
        else:
            merged.append(block[block.max(axis=1).argmax()])
    shape = (len(merged), scores.shape[1])
    return np.asarray(merged, np.float32).reshape(shape), [words[word] for word in tokens_of]


def token_scores(
    source: str, scores: Floats, offsets: Sequence[tuple[int, int]], names: Sequence[str]
) -> list[SpanScore]:
    found = []
    for index, (row, (start, end)) in enumerate(zip(scores, offsets, strict=True)):
        best = int(row.argmax())
        if names[best] != "O":
            token = SpanScore(entity=names[best], score=float(row[best]), word=source[start:end], start=start, end=end)
            token["index"] = index + 1
            found.append(token)
    return found


def span_scores(
    source: str, scores: Floats, offsets: Sequence[tuple[int, int]], names: Sequence[str]
) -> list[SpanScore]:
    best = scores.argmax(axis=1)
    found = []
    for first, last, label in tags_to_spans([names[b] for b in best]):
        start, end = offsets[first][0], offsets[last - 1][1]
        score = float(scores[first:last].max(axis=1).mean())
        found.append(SpanScore(entity_group=label, score=score, word=source[start:end], start=start, end=end))
    return found


def in_words(found: SpanScore, words: Sequence[tuple[int, int]]) -> SpanScore:
    """The same span with `start` and `end` counted in the caller's words."""
    inside = [i for i, (start, end) in enumerate(words) if start < found["end"] and end > found["start"]]
    return {**found, "start": inside[0], "end": inside[-1] + 1}
