"""Decoding of each kind on logits that one can work out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mtserve.errors import InputError
from mtserve.tasks import KINDS
from mtserve.tasks.scores import sigmoid, softmax
from mtserve.tasks.windows import merge, merge_tensor
from mtserve.tasks.work import Work
from mtserve.text import Text, text_spec
from tests.tiny import EOS, PAD, TOKENIZER_JSON

TEXT = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))


def decoded(kind: str, raw: dict[str, Any], item: Any, logits: Any, parameters: dict[str, Any] | None = None) -> Any:
    """What a kind makes of these logits; a function of the rows may give them."""
    handler = KINDS[kind]
    options = handler.options.model_validate(raw)
    example = handler.parse(item)
    chosen = handler.parameters.model_validate(parameters or {})
    work = Work("t", example, chosen, handler.rows(example, options, TEXT))
    work.logits = [np.asarray(row, np.float32) for row in (logits(work.rows) if callable(logits) else logits)]
    return handler.decode(work, options, TEXT)


def test_softmax_and_sigmoid_do_not_overflow() -> None:
    big = np.array([-1e4, 0, 1e4], np.float32)
    assert softmax(big).tolist() == [0, 0, 1]
    assert sigmoid(big).tolist() == [0, 0.5, 1]


def test_classification() -> None:
    raw, logits = {"labels": ["a", "b", "c"]}, [[0, math.log(3), 0]]
    best, *rest = decoded("classification", raw, "one", logits)
    assert best == {"label": "b", "score": pytest.approx(0.6)}
    assert [r["label"] for r in rest] == ["a", "c"]
    assert decoded("classification", raw, "one", logits, {"top_k": 1}) == [best]
    assert decoded("classification", raw, "one", logits, {"threshold": 0.5}) == [best]
    none = decoded("classification", raw, "one", logits, {"function_to_apply": "none", "top_k": 1})
    assert none[0]["score"] == pytest.approx(math.log(3))


def test_multi_label_scores_are_independent() -> None:
    raw = {"labels": ["a", "b"], "multi_label": True}
    found = decoded("classification", raw, "one", [[math.log(3), math.log(4)]])
    assert [(r["label"], round(r["score"], 3)) for r in found] == [("b", 0.8), ("a", 0.75)]


def test_similarity_is_bounded() -> None:
    pair = {"text": "one", "text_pair": "two"}
    raw = {"low": 0, "high": 5}
    assert [decoded("similarity", raw, pair, [[x]])["score"] for x in (-3, 0.5, 7)] == [0, 2.5, 5]
    cosine = {**raw, "method": "cosine"}
    assert decoded("similarity", cosine, pair, [[3, 4], [6, 8]])["score"] == pytest.approx(5)
    assert decoded("similarity", cosine, pair, [[1, 0], [1, 1]])["score"] == pytest.approx(5 * math.sqrt(0.5))
    assert decoded("similarity", cosine, pair, [[1, 0], [-1, 0]])["score"] == 0
    assert decoded("similarity", cosine, pair, [[0, 0], [1, 1]])["score"] == 0


def test_multiple_choice_ranks_any_number_of_choices() -> None:
    item = {"question": "one", "choices": ["red", "green", "blue"]}
    found = decoded("multiple_choice", {}, item, [[0], [math.log(2)], [math.log(5)]])
    assert [(c["index"], c["choice"], round(c["score"], 3)) for c in found] == [
        (2, "blue", 0.625),
        (1, "green", 0.25),
        (0, "red", 0.125),
    ]
    assert len(decoded("multiple_choice", {}, item, [[0], [1], [2]], {"top_k": 2})) == 2


NAMES = {"labels": ["person", "place"]}  # outputs: O, B-person, I-person, B-place, I-place


def tags(*wanted: str) -> Any:
    """Logits of rows in which the tokens of the text have these tags, by name."""
    names = ["O", "B-person", "I-person", "B-place", "I-place"]

    def make(rows: Any) -> list[Any]:
        out = np.zeros((len(rows[0]), 5))
        own = np.flatnonzero(~rows[0].special)
        assert len(own) == len(wanted), (len(own), wanted)
        for at, tag in zip(own, wanted, strict=True):
            out[at, names.index(tag)] = 9
        return [out]

    return make


def spans(found: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    return [(f["entity_group"], f["word"], f["start"], f["end"]) for f in found]


def test_spans_count_characters_of_the_callers_text() -> None:
    # ana silva | moved | from | porto | .  -- every word is one token of the tiny vocabulary
    text = "  Ana Silva moved from PORTO."
    logits = tags("B-person", "I-person", "O", "O", "B-place", "O")
    found = decoded("token_classification", NAMES, text, logits)
    assert spans(found) == [("person", "Ana Silva", 2, 11), ("place", "PORTO", 23, 28)]
    assert all(text[f["start"] : f["end"]] == f["word"] for f in found)
    assert found[0]["score"] == pytest.approx(math.exp(9) / (math.exp(9) + 4))


def test_spans_of_words_count_words() -> None:
    item = {"words": ["Ana", "Silva", "moved"]}
    found = decoded("token_classification", NAMES, item, tags("B-person", "I-person", "O"))
    assert spans(found) == [("person", "Ana Silva", 0, 2)]


def test_an_inside_tag_that_continues_nothing_is_no_span() -> None:
    found = decoded("token_classification", NAMES, "ana moved from porto", tags("I-person", "O", "B-place", "I-person"))
    assert spans(found) == [("place", "from", 10, 14)]


def test_neighbouring_spans_stay_apart() -> None:
    found = decoded("token_classification", NAMES, "ana silva", tags("B-person", "B-person"))
    assert spans(found) == [("person", "ana", 0, 3), ("person", "silva", 4, 9)]


def test_aggregation_strategies_differ_as_they_do_in_transformers() -> None:
    text = "xy"  # one word of two tokens: x ##y
    rows = np.zeros((4, 5), np.float32)
    rows[1, 1], rows[2, 3] = 2, 3  # x: B-person; ##y, surer: B-place

    def found(strategy: str) -> Any:
        return decoded("token_classification", NAMES, text, [rows], {"aggregation_strategy": strategy})

    assert spans(found("simple")) == [("person", "x", 0, 1), ("place", "y", 1, 2)]
    assert spans(found("first")) == [("person", "xy", 0, 2)]
    assert spans(found("max")) == [("place", "xy", 0, 2)]
    assert spans(found("average")) == [("place", "xy", 0, 2)]
    assert [(f["entity"], f["index"], f["word"]) for f in found("none")] == [("B-person", 1, "x"), ("B-place", 2, "y")]


def test_ignore_labels() -> None:
    logits = tags("B-person", "B-place")
    found = decoded("token_classification", NAMES, "ana porto", logits, {"ignore_labels": ["person"]})
    assert spans(found) == [("place", "porto", 4, 9)]


def test_windows_of_a_long_text_give_each_token_once() -> None:
    """Each window claims a tag for all it sees; the window that sees most on both sides of a token is believed."""
    raw = {**NAMES, "max_length": 8, "on_long": "window", "stride": 3}
    words = "one two one two one two one two one".replace("two", "red")

    def make(rows: Any) -> list[Any]:
        assert [(row.first, row.own_tokens) for row in rows] == [(0, 6), (3, 6)]
        outs = [np.zeros((len(row), 5)) for row in rows]
        outs[0][:, 1] = outs[1][:, 3] = 1  # the first says B-person of every token, the second B-place
        return outs

    found = decoded("token_classification", raw, words, make)
    assert [(f["start"], f["end"]) for f in found] == [(4 * i, 4 * i + 3) for i in range(9)]
    assert [f["entity_group"] for f in found] == ["person"] * 5 + ["place"] * 4


def test_empty_text_has_no_spans() -> None:
    assert decoded("token_classification", NAMES, "", [np.zeros((2, 5))]) == []


def test_windows_average_by_tokens() -> None:
    handler = KINDS["classification"]
    options = handler.options.model_validate({"labels": ["a", "b"], "max_length": 8, "on_long": "window", "stride": 0})
    rows = handler.rows(handler.parse("one " * 8), options, TEXT)
    assert [row.own_tokens for row in rows] == [6, 2]
    logits = [np.array([1, 0], np.float32), np.array([0, 4], np.float32)]
    np.testing.assert_allclose(merge(rows, logits), [[0.75, 1.0]])
    import torch

    tensor = merge_tensor([rows, rows[:1]], torch.tensor(np.stack([*logits, logits[0]])))
    np.testing.assert_allclose(tensor[0], [[0.75, 1.0]])
    np.testing.assert_allclose(tensor[1], [[1.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("classification", 3, "a string or an object with text, text_pair; found a number"),
        ("classification", None, "found null"),
        ("classification", {"txt": "a"}, "text: Field required; txt: not allowed here; allowed: text, text_pair"),
        ("classification", {"text": 3}, "text: Input should be a valid string"),
        ("similarity", "one", "an input of similarity is an object with text, text_pair; found a string"),
        ("multiple_choice", {"question": "a", "choices": []}, "choices: Tuple should have at least 1 item"),
        ("token_classification", {"text": "a", "words": ["a"]}, "give either text or words"),
        ("token_classification", {"words": ["a", " "]}, "words must not be empty"),
        ("generation", ["a"], "an input of generation is a string or an object with text; found a list"),
    ],
)
def test_bad_items_say_what_was_found_and_what_is_allowed(kind: str, item: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        KINDS[kind].parse(item)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        ("classification", {"labels": []}, "at least 1 item"),
        ("similarity", {"low": 1, "high": 1}, "low 1.0 must be less than high 1.0"),
        ("generation", {"template": "no place"}, "template must contain {source} and {target} once each"),
        ("generation", {"on_long": "window"}, "not possible for generation"),
        ("generation", {"max_new_tokens": 128}, "must be less than max_length 128"),
        ("token_classification", {"labels": ["a", "a"]}, "labels must be distinct"),
        ("classification", {"labels": ["a"], "on_long": "window", "stride": 64}, "must be less than half"),
    ],
)
def test_bad_options_are_refused(kind: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        KINDS[kind].options.model_validate(raw)
