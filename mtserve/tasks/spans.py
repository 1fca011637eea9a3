"""Words, tags and spans of token classification. Knows no model and no tokenizer.

Words are found in the characters themselves, not by a tokenizer's pre-tokenizer: one text has the same words under
every trunk, and a span's limits are exact even where a token reaches over them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from mtserve.rows import Ints

Span = tuple[int, int, str]
"""(start, end, label): end exclusive."""


_ASCII_WORD = re.compile(r"\w+|[^\w\s]")


def word_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of the words of a text: runs of letters, digits, marks and joiners; other characters alone."""
    if text.isascii():
        return [match.span() for match in _ASCII_WORD.finditer(text)]
    spans: list[tuple[int, int]] = []
    inside = False
    for at, char in enumerate(text):
        if char.isspace():
            inside = False
        elif inside and _joins(char):
            spans[-1] = (spans[-1][0], at + 1)
        else:
            spans.append((at, at + 1))
            inside = _joins(char)
    return spans


def _joins(char: str) -> bool:
    return char.isalnum() or char in "_\u200c\u200d" or unicodedata.category(char).startswith("M")


def joined_words(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Pre-split words as one text with spaces between, and the character span of each word in it."""
    ends = np.cumsum([len(word) + 1 for word in words])
    return " ".join(words), [(int(e) - 1 - len(w), int(e) - 1) for w, e in zip(words, ends, strict=True)]


def token_words(text: str, offsets: Ints, words: Sequence[tuple[int, int]]) -> Ints:
    """(len,) index of the word that holds each token's first character other than a space; -1 where there is none."""
    size = len(text)
    owner = np.full(size + 1, -1, np.int32)
    for index, (start, end) in enumerate(words):
        owner[start:end] = index
    held = np.where(owner >= 0, np.arange(size + 1), size)
    following = np.minimum.accumulate(held[::-1])[::-1]  # the first character from here on that a word holds
    at = following[np.minimum(offsets[:, 0], size)]
    return np.where(at < np.minimum(offsets[:, 1], size), owner[at], -1).astype(np.int32)


def tag_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The IOB2 tags of span labels: O first, then B- and I- of each label."""
    return ("O", *(f"{prefix}-{label}" for label in labels for prefix in "BI"))


def tags_to_spans(tags: Sequence[str]) -> list[Span]:
    """Strict IOB2 (Ramshaw and Marcus, 1995; Tjong Kim Sang, 2002): a span starts at B- and goes on at I- of the same
    label; an I- that continues nothing belongs to no span. Positions count tags."""
    spans: list[Span] = []
    open_label = None
    for at, tag in enumerate(tags):
        prefix, _, label = tag.partition("-")
        if prefix == "B":
            spans.append((at, at + 1, label))
            open_label = label
        elif prefix == "I" and label == open_label:
            spans[-1] = (spans[-1][0], at + 1, label)
        else:
            open_label = None
    return spans


def spans_to_tags(words: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[str]:
    """Strict IOB2 tags of words from character spans; a word belongs to a span that it overlaps."""
    tags = ["O"] * len(words)
    for start, end, label in spans:
        inside = [i for i, (s, e) in enumerate(words) if s < end and e > start]
        for index in inside:
            tags[index] = f"{'B' if index == inside[0] else 'I'}-{label}"
    return tags


def invalid_tags(tags: Sequence[str]) -> Iterator[int]:
    """Positions of tags that break strict IOB2: no O, B-x or I-x, or an I-x that continues nothing."""
    for at, (before, tag) in enumerate(pairwise(["O", *tags])):
        prefix, _, label = tag.partition("-")
        if not (tag == "O" or (prefix == "B" and label) or (prefix == "I" and label and before[1:] == tag[1:])):
            yield at
