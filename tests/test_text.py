"""Rows of texts: special tokens, truncation, windows, prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtserve.errors import CheckpointError, InputError
from mtserve.preparation import PRESETS
from mtserve.rows import Row
from mtserve.text import Limits, OnLong, Text, TextSpec, text_spec
from tests.tiny import CLS, CORPUS, EOS, PAD, SEP, TOKENIZER_JSON

TEXT = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
ORACLE = Tokenizer.from_str(TOKENIZER_JSON)
ORACLE.encode_special_tokens = True
words = st.lists(st.sampled_from(CORPUS.split()), max_size=30).map(" ".join)


def own_ids(row: Row) -> list[int]:
    return [int(i) for i in row.ids[~row.special]]


@given(text=words, pair=st.none() | words)
def test_short_texts_are_what_the_tokenizer_says(text: str, pair: str | None) -> None:
    (row,) = TEXT.rows(text, pair, limits=Limits(200))
    oracle = ORACLE.encode(text, pair)
    assert row.ids.tolist() == oracle.ids
    assert row.type_ids.tolist() == oracle.type_ids
    assert [tuple(o) for o in row.offsets.tolist()] == oracle.offsets
    assert row.special.tolist() == [bool(s) for s in oracle.special_tokens_mask]
    assert row.cut == 0


@given(text=words, pair=st.none() | words, limit=st.integers(6, 40), cut_first=st.booleans())
def test_truncation_keeps_the_limit_and_counts_what_it_cuts(
    text: str, pair: str | None, limit: int, cut_first: bool
) -> None:
    (row,) = TEXT.rows(text, pair, limits=Limits(limit), cut_first=cut_first)
    first = ORACLE.encode(text, add_special_tokens=False).ids
    second = [] if pair is None else ORACLE.encode(pair, add_special_tokens=False).ids
    budget = limit - (2 if pair is None else 3)
    assert len(row) <= limit
    assert row.own_tokens == min(len(first) + len(second), budget)
    assert row.cut == len(first) + len(second) - row.own_tokens
    kept = own_ids(row)
    of_second = sum(row.type_ids.tolist()) - 1 if pair is not None else 0
    of_first = len(kept) - of_second
    assert kept == first[:of_first] + second[:of_second]
    if pair is not None and row.cut and not cut_first:  # the longer is cut first
        assert abs(of_first - of_second) <= 1 or of_first == len(first) or of_second == len(second)
    if cut_first and len(second) < budget:
        assert of_second == len(second)


@given(text=words, pair=st.none() | words, limit=st.integers(24, 40), stride=st.integers(0, 3))
def test_windows_hold_every_token(text: str, pair: str | None, limit: int, stride: int) -> None:
    first = ORACLE.encode(text, add_special_tokens=False).ids
    second = [] if pair is None else ORACLE.encode(pair, add_special_tokens=False).ids
    if min(len(first), len(second)) > 10:
        return
    rows = TEXT.rows(text, pair, limits=Limits(limit, "window", stride))
    assert [row.window for row in rows] == list(range(len(rows)))
    assert all(len(row) <= limit and row.cut == 0 for row in rows)
    if pair is None:
        seen = {row.first + at: token for row in rows for at, token in enumerate(own_ids(row))}
        assert [seen[i] for i in range(len(first))] == first
    else:
        shorter = second if len(first) >= len(second) else first
        for row in rows:
            mine = [int(i) for i in row.ids[(row.type_ids == int(len(first) >= len(second))) & ~row.special]]
            assert mine == shorter


def test_error_on_long_names_both_numbers() -> None:
    with pytest.raises(InputError, match=r"has 4 tokens; this task allows 3 \(max_length 5\)"):
        TEXT.rows("one one one one", limits=Limits(5, "error"))


def test_special_tokens_in_a_callers_text_stay_text() -> None:
    (row,) = TEXT.rows("[SEP]", limits=Limits(20))
    assert SEP not in own_ids(row)


def test_special_tokens_in_a_template_are_tokens() -> None:
    row = TEXT.prompt("", "[SEP] one", " [SEP]", max_length=20)
    assert row.ids.tolist().count(SEP) == 1
    assert row.ids[-1] == SEP


def test_a_prompt_cuts_only_the_callers_text() -> None:
    row = TEXT.prompt("one : ", "one one one one one one", " [SEP]", max_length=6)
    assert len(row) == 6
    assert row.ids[-1] == SEP
    assert row.cut == 3
    with pytest.raises(InputError, match="no room for the text"):
        TEXT.prompt("one : ", "one", " [SEP]", max_length=3)


def test_baked_in_padding_and_truncation_are_cleared() -> None:
    baked = Tokenizer.from_str(TOKENIZER_JSON)
    baked.enable_truncation(4)
    baked.enable_padding(length=16)
    (row,) = Text(baked.to_str(), TextSpec()).rows("one one one one one", limits=Limits(100))
    assert len(row) == 7


def test_a_tokenizer_without_a_pair_template_gets_a_separator() -> None:
    import json

    raw = json.loads(TOKENIZER_JSON)
    raw["post_processor"] = None
    bare = json.dumps(raw)
    spec = text_spec(bare, pad_id=0, eos_id=None)
    assert spec.pair_separator == "\n"
    assert text_spec(TOKENIZER_JSON, pad_id=0, eos_id=None).pair_separator is None
    with pytest.raises(InputError, match="text is empty"):
        Text(bare, spec).rows("", limits=Limits(10))


def test_empty_text_is_its_special_tokens() -> None:
    (row,) = TEXT.rows("", limits=Limits(10))
    assert row.ids.tolist() == [CLS, SEP]


def test_a_damaged_tokenizer_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        Text("{}", TextSpec())


def written(text: str, row: Row) -> list[str]:
    """The caller's characters of each token of a row."""
    return [text[start:end] for start, end in row.offsets.tolist()]


PREPARED = ("tashkeel", "html_entities", "users:book", "repeats:2", "spaces")


def test_offsets_count_the_callers_characters() -> None:
    text = "  good &amp; b\u064fad  @you,  onnnne"
    small = Text(TOKENIZER_JSON, TextSpec(preparation=PREPARED))
    (row,) = small.rows(text, limits=Limits(60))
    (plain,) = TEXT.rows("good & bad book , onne", limits=Limits(60))
    assert row.ids.tolist() == plain.ids.tolist()
    words = ["", "good", "&amp;", "b\u064fad", "@you", ",", *["o", "n", "nnn", "e"], ""]
    assert written(text, row) == words
    (of_task,) = TEXT.rows(text, limits=Limits(60, preparation=PREPARED))
    assert (of_task.key, of_task.offsets.tolist()) == (row.key, row.offsets.tolist())
    (none,) = small.rows(text, limits=Limits(60, preparation=()))
    assert none.key == TEXT.rows(text, limits=Limits(60))[0].key


@pytest.mark.parametrize("separator", [None, "\n", " one two "])
@pytest.mark.parametrize("on_long", ["truncate", "window"])
def test_both_texts_of_a_pair_keep_their_own_characters(separator: str | None, on_long: OnLong) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER_JSON)
    if separator is not None:
        tokenizer.post_processor = None
    text = Text(tokenizer.to_str(), TextSpec(preparation=PREPARED, pair_separator=separator))
    first, second = "  good  g\u064food town", "&amp;  bad   bad   " * 6
    rows = text.rows(first, second, limits=Limits(14, on_long, 1))
    assert (len(rows) > 1) == (on_long == "window")
    for row in rows:
        own = [span for span, special in zip(row.offsets.tolist(), row.special.tolist(), strict=True) if not special]
        in_first = [first[start:end] for start, end in own[:3]]
        assert in_first == ["good", "g\u064food", "town"]
        pieces = [second[start:end] for start, end in own[3:]]
        assert set(pieces) <= {"&amp;", "bad", ""}
        assert pieces.count("") == (0 if separator is None or row.window else len(text.plain(separator)))


def test_a_prompt_prepares_the_callers_text_alone() -> None:
    row = TEXT.prompt("gooood ", "gooood  @you", " @you", max_length=60, preparation=("users:book", "repeats:2"))
    own = "gooood  @you"
    assert row.ids[~row.special].tolist() == TEXT.plain("good book")[:0] + TEXT.plain("good book")
    assert written(own, row)[len(TEXT.plain("gooood ")) :][: row.own_tokens] == ["gooood", "@you"]
    assert row.ids.tolist()[: len(TEXT.plain("gooood "))] == TEXT.plain("gooood ")


def test_presets_are_spelled_out_in_a_spec() -> None:
    spec = text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS, preparation=["marbert"])
    assert spec.preparation == PRESETS["marbert"]
    with pytest.raises(CheckpointError, match="'shout' is unknown"):
        text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS, preparation=["shout"])


def test_an_unknown_preparation_step_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'stem' is unknown"):
        Text(TOKENIZER_JSON, TextSpec(preparation=("stem",)))


def test_extended_rows_keep_their_prompt() -> None:
    row = TEXT.prompt("", "one", "", max_length=9)
    longer = row.extended([7])
    assert longer.ids.tolist() == [*row.ids.tolist(), 7]
    assert longer.key != row.key
    assert longer.ids.dtype == np.int32


def test_what_is_appended_is_never_cut() -> None:
    for text in ("one", "one two three four five six seven"):
        (row,) = TEXT.rows(text, limits=Limits(8, append="[SEP][UNK]"))
        assert row.ids[-2:].tolist() == [*TEXT.literal("[SEP]"), *TEXT.literal("[UNK]")]
        assert row.special[-2:].all()
        assert len(row) <= 8
    windows = TEXT.rows("one two three four five six seven eight nine", limits=Limits(8, "window", 1, append="[UNK]"))
    assert len(windows) > 1
    assert all(row.ids[-1] == TEXT.literal("[UNK]")[0] and len(row) <= 8 for row in windows)
    for pair, least in ((None, 5), ("two", 7)):
        with pytest.raises(InputError, match=rf"special tokens take {least - 1 - (pair is not None)} of 4 tokens"):
            TEXT.rows("one", pair, limits=Limits(4, append="[SEP][UNK]"))


@pytest.mark.parametrize("on_long", ["truncate", "window"])
@given(
    pairs=st.lists(st.tuples(st.text("ab éz,", max_size=40), st.text("ab éz,", max_size=40)), min_size=1, max_size=9)
)
@settings(max_examples=40, deadline=None)
def test_texts_encoded_ahead_make_the_same_rows(on_long: OnLong, pairs: list[tuple[str, str]]) -> None:
    """Also where one text is used several times and cut each time."""
    text = Text(TOKENIZER_JSON, TextSpec())
    limits = Limits(16, on_long, 2)
    ahead = text.ahead([one for pair in pairs for one in pair])

    def rows(of: Text, first: str, second: str | None) -> Any:
        try:
            return [
                (r.ids.tolist(), r.type_ids.tolist(), r.offsets.tolist(), r.cut, r.window, r.first)
                for r in of.rows(first, second, limits=limits)
            ]
        except InputError as error:
            return str(error)

    for first, second in pairs * 2:
        assert rows(ahead, first, second) == rows(text, first, second)
        assert rows(ahead, first, None) == rows(text, first, None)
