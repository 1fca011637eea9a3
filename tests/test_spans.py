"""Words, tags and spans, against seqeval where it has an opinion."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.scheme import IOB2, Entities

from mtserve.tasks.spans import (
    invalid_tags,
    joined_words,
    spans_to_tags,
    tag_names,
    tags_to_spans,
    token_words,
    word_spans,
)

tags_lists = st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=12)


@given(tags=tags_lists)
def test_strict_iob2_agrees_with_seqeval(tags: list[str]) -> None:
    oracle = [(e.start, e.end, e.tag) for e in Entities([tags], IOB2).entities[0]]
    assert tags_to_spans(tags) == oracle


@given(tags=tags_lists)
def test_valid_tags_survive_a_round_trip(tags: list[str]) -> None:
    words = [(2 * i, 2 * i + 1) for i in range(len(tags))]
    spans = [(words[s][0], words[e - 1][1], label) for s, e, label in tags_to_spans(tags)]
    again = spans_to_tags(words, spans)
    if not list(invalid_tags(tags)):
        assert again == tags
    assert not list(invalid_tags(again))


def test_invalid_tags() -> None:
    assert list(invalid_tags(["I-a", "B-a", "I-b", "I-b", "x", "B-", "O"])) == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ana, 3 rue d'Été!", ["Ana", ",", "3", "rue", "d", "'", "Été", "!"]),
        ("a  b\n", ["a", "b"]),
        ("", []),
        ("كَتَبَ زيد", ["كَتَبَ", "زيد"]),
        ("e\u0301te\u0301 x", ["e\u0301te\u0301", "x"]),
        ("snake_case 東京", ["snake_case", "東京"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert [text[s:e] for s, e in word_spans(text)] == words


@given(text=st.text(max_size=40))
def test_words_are_in_order_and_hold_every_character_but_spaces(text: str) -> None:
    spans = word_spans(text)
    assert all(a < b for a, b in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    inside = {i for s, e in spans for i in range(s, e)}
    assert all((i in inside) != c.isspace() for i, c in enumerate(text))


def test_joined_words() -> None:
    text, spans = joined_words(["São", "Paulo", "!"])
    assert text == "São Paulo !"
    assert [text[s:e] for s, e in spans] == ["São", "Paulo", "!"]


def test_tag_names() -> None:
    assert tag_names(["a", "b"]) == ("O", "B-a", "I-a", "B-b", "I-b")


@given(text=st.text("ab_1 .,-\t\n\x1c'", max_size=30))
def test_words_of_plain_text_are_those_of_any_text(text: str) -> None:
    """The short way for ASCII gives what the long way gives, here forced by a letter behind the text."""
    assert word_spans(text) == [span for span in word_spans(text + " é") if span[1] <= len(text)]


@given(data=st.data(), text=st.text("ab .é", max_size=20))
def test_a_token_belongs_to_the_word_of_its_first_character_that_a_word_holds(data: st.DataObject, text: str) -> None:
    words = word_spans(text)
    limits = st.tuples(st.integers(0, len(text)), st.integers(0, len(text) + 2))
    offsets = data.draw(st.lists(limits, min_size=1, max_size=6))
    found = token_words(text, np.asarray(offsets, np.int32), words)
    for (start, end), word in zip(offsets, found.tolist(), strict=True):
        held = [n for at in range(start, min(end, len(text))) for n, (s, e) in enumerate(words) if s <= at < e]
        assert word == (held[0] if held else -1)
