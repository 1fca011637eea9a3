"""Targets, metrics and baselines of each kind, worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtserve.errors import InputError
from mtserve.tasks import KINDS
from mtserve.tasks.base import IGNORED
from mtserve.text import Text, text_spec
from tests.tiny import EOS, PAD, TOKENIZER_JSON

TEXT = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
NAMES = {"labels": ["person", "place"]}


def target(kind: str, raw: dict[str, Any], record: dict[str, Any]) -> Any:
    handler = KINDS[kind]
    options = handler.options.model_validate(raw)
    return handler.features(handler.labelled.model_validate(record), options, TEXT)[1]


def measured(kind: str, raw: dict[str, Any], records: list[dict[str, Any]], predictions: list[Any]) -> dict[str, float]:
    handler = KINDS[kind]
    examples = [handler.labelled.model_validate(record) for record in records]
    return handler.metrics(predictions, examples, handler.options.model_validate(raw))


def test_classification_targets() -> None:
    assert target("classification", {"labels": ["a", "b"]}, {"text": "x", "label": "b"}) == 1
    multi = {"labels": ["a", "b", "c"], "multi_label": True}
    assert target("classification", multi, {"text": "x", "label": ["c", "a"]}).tolist() == [1, 0, 1]
    assert target("classification", multi, {"text": "x", "label": []}).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="'z' is not among a, b"):
        target("classification", {"labels": ["a", "b"]}, {"text": "x", "label": "z"})


def test_labels_are_fitted_in_a_stable_order() -> None:
    records = [{"label": "b"}, {"label": "a"}, {"label": "b"}]
    assert KINDS["classification"].fit(records, {})["labels"] == ["a", "b"]
    assert KINDS["classification"].fit(records, {"labels": ["b", "a"]})["labels"] == ["b", "a"]
    assert KINDS["classification"].fit([{"label": 2}, {"label": 10}], {})["labels"] == ["10", "2"]
    tags = [{"words": ["x"], "tags": ["B-z"]}, {"spans": [{"start": 0, "end": 1, "label": "y"}]}]
    assert KINDS["token_classification"].fit(tags, {})["labels"] == ["y", "z"]


def test_similarity_targets_are_shares_of_the_range() -> None:
    pair = {"text": "a", "text_pair": "b"}
    assert target("similarity", {"low": 1, "high": 5}, {**pair, "score": 2}) == 0.25
    with pytest.raises(InputError, match=r"6.0 is not in \[0.0, 5.0\]"):
        target("similarity", {"low": 0, "high": 5}, {**pair, "score": 6})


def test_multiple_choice_answers_by_index_or_letter() -> None:
    record = {"question": "a", "choices": ["x", "y"]}
    assert target("multiple_choice", {}, {**record, "answer": 1}) == 1
    assert target("multiple_choice", {}, {**record, "answer": "B"}) == 1
    with pytest.raises(InputError, match="2 is not the index of one of 2 choices"):
        target("multiple_choice", {}, {**record, "answer": 2})


def test_token_targets_stand_at_the_first_token_of_each_word() -> None:
    # [CLS] ana x ##y moved [SEP]: "ana xy" is a person
    spans = [{"start": 0, "end": 6, "label": "person"}]
    (found,) = target("token_classification", NAMES, {"text": "ana xy moved", "spans": spans})
    assert found.tolist() == [IGNORED, 1, 2, IGNORED, 0, IGNORED]
    words = {"words": ["ana", "xy", "moved"], "tags": ["B-person", "I-person", "O"]}
    (same,) = target("token_classification", NAMES, words)
    assert same.tolist() == found.tolist()


def test_a_word_counts_once_over_windows() -> None:
    raw = {**NAMES, "max_length": 8, "on_long": "window", "stride": 3}
    record = {"text": "one red one red one red one red one", "spans": []}
    counted = sum(int((row != IGNORED).sum()) for row in target("token_classification", raw, record))
    assert counted == 9


@pytest.mark.parametrize(
    "record",
    [
        {"text": "abc"},
        {"text": "abc", "spans": [{"start": 1, "end": 9, "label": "x"}]},
        {"words": ["a", "b"], "tags": ["O"]},
        {"words": ["a", "b"], "tags": ["O", "I-x"]},
    ],
)
def test_token_truth_must_fit_its_text(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs spans|is not in a text|need as many tags|breaks IOB2"):
        KINDS["token_classification"].labelled.model_validate(record)


def test_generation_targets_are_the_answer_and_its_end() -> None:
    raw = {"template": "{source} [SEP]{target}", "max_new_tokens": 4, "max_length": 9}
    handler = KINDS["generation"]
    options = handler.options.model_validate(raw)
    record = handler.labelled.model_validate({"text": "one " * 9, "target": "red green"})
    (row,), wanted = handler.features(record, options, TEXT)
    assert len(row) == 9
    counted = wanted != IGNORED
    assert wanted[counted].tolist() == [*row.ids[-3:-1].tolist(), EOS]
    assert np.flatnonzero(counted).tolist() == [5, 6, 7]  # the separator predicts the first token of the answer
    with pytest.raises(InputError, match="no room for the text"):
        handler.features(handler.labelled.model_validate({"text": "one", "target": "red " * 9}), options, TEXT)
    with pytest.raises(InputError, match="no room for the text"):
        handler.features(handler.labelled.model_validate({"text": "one", "target": "red " * 7}), options, TEXT)


def test_classification_metrics() -> None:
    records = [{"text": "", "label": label} for label in "aab"]
    guesses = [[{"label": label, "score": 1.0}] for label in "aba"]
    found = measured("classification", {"labels": ["a", "b", "never"]}, records, guesses)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["macro_f1"] == pytest.approx(0.25)  # a: 1/2, b: 0; a label that occurs nowhere does not count


def test_multi_label_metrics() -> None:
    raw = {"labels": ["a", "b"], "multi_label": True}
    records = [{"text": "", "label": ["a", "b"]}, {"text": "", "label": []}]
    guesses = [[{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}]] * 2
    found = measured("classification", raw, records, guesses)
    assert found["accuracy"] == 0
    assert found["micro_f1"] == pytest.approx(0.5)


def test_similarity_metrics_guard_constants() -> None:
    records = [{"text": "", "text_pair": "", "score": s} for s in (0, 0.5, 1)]
    found = measured("similarity", {}, records, [{"score": s} for s in (0.1, 0.2, 0.9)])
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 1
    assert measured("similarity", {}, records, [{"score": 0.5}] * 3) == {"pearson": 0.0, "spearman": 0.0}


def test_span_metrics_want_limits_and_label() -> None:
    gold = [{"start": 0, "end": 3, "label": "person"}, {"start": 4, "end": 9, "label": "place"}]
    guess = [
        {"start": 0, "end": 3, "entity_group": "person"},
        {"start": 4, "end": 9, "entity_group": "person"},
        {"start": 4, "end": 8, "entity_group": "place"},
    ]
    found = measured("token_classification", NAMES, [{"text": "ana porto", "spans": gold}], [guess])
    assert found.pop("accuracy") == 0.5  # "porto" has the tag of the later of its two guesses, person
    assert found == {"precision": pytest.approx(1 / 3), "recall": 0.5, "f1": pytest.approx(0.4)}
    words = {"words": ["ana", "porto"], "tags": ["B-person", "B-place"]}
    right = [{"start": 0, "end": 1, "entity_group": "person"}]
    assert measured("token_classification", NAMES, [words], [right])["precision"] == 1


def test_baselines() -> None:
    def baseline(kind: str, raw: dict[str, Any], records: list[dict[str, Any]]) -> Any:
        handler = KINDS[kind]
        return handler.baseline(
            [handler.labelled.model_validate(r) for r in records], handler.options.model_validate(raw)
        )

    found = baseline("classification", {"labels": ["a", "b"]}, [{"text": "", "label": label} for label in "abb"])
    assert found[0] == {"label": "b", "score": pytest.approx(2 / 3)}
    pair = {"text": "", "text_pair": ""}
    assert baseline("similarity", {}, [{**pair, "score": s} for s in (0, 1)]) == {"score": 0.5}
    choice = {"question": "", "choices": ["x", "y"]}
    assert baseline("multiple_choice", {}, [{**choice, "answer": a} for a in (1, 1, 0)])[0]["index"] == 1
    assert baseline("token_classification", NAMES, [{"text": "", "spans": []}]) == []
