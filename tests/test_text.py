"""Rows of texts: special tokens, truncation, windows, prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtserve.errors import CheckpointError, InputError
from mtserve.rows import Row
from mtserve.text import Limits, Text, TextSpec, text_spec
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


def test_an_unknown_preparation_step_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'stem' is unknown"):
        Text(TOKENIZER_JSON, TextSpec(preparation=("stem",)))


def test_extended_rows_keep_their_prompt() -> None:
    row = TEXT.prompt("", "one", "", max_length=9)
    longer = row.extended(7)
    assert longer.ids.tolist() == [*row.ids.tolist(), 7]
    assert longer.key != row.key
    assert longer.ids.dtype == np.int32
