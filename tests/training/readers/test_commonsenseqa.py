"""CommonsenseQA in both forms, with and without answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.training.readers.helpers import both, good
from training.data.source import Source, fingerprint

CHOICES = [{"label": "B", "text": "boat"}, {"label": "A", "text": "hat"}, {"label": "1", "text": "rain"}]


def nested(**changed: Any) -> dict[str, Any]:
    question = {"stem": "What floats?", "question_concept": "float", "choices": CHOICES}
    return {"answerKey": "A", "id": "q1", "question": question, **changed}


def test_the_answer_is_found_by_its_label(tmp_path: Path) -> None:
    unanswered = nested()
    del unanswered["answerKey"]
    rows = [nested(), nested(answerKey="1"), unanswered, nested(answerKey="")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = good(tmp_path, path="d.jsonl", format="commonsenseqa")
    question = {"id": "q1", "question": "What floats?", "choices": ["boat", "hat", "rain"]}
    assert found == [{**question, "answer": 1}, {**question, "answer": 2}, question, question]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (nested(answerKey="C"), "answerKey 'C' is not the label of one choice; found ['B', 'A', '1']"),
        (nested(question={"stem": "x"}), "a question needs choices of label and text; found None"),
        ({"question": "x", "choices": {"label": ["A"], "text": []}}, "choices need equally many labels and texts"),
        ({"question": "x", "choices": {"label": "A", "text": "b"}}, "choices need equally many labels and texts"),
    ],
)
def test_faults(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    records, bad = both(tmp_path, path="d.jsonl", format="commonsenseqa")
    assert not records
    assert bad[0].where == "d.jsonl:1"
    assert bad[0].message.startswith(message)


def test_rows_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's data set has flat columns and an empty key where there is no answer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "qa").mkdir()
    choices = {"label": ["A", "B"], "text": ["boat", "hat"]}
    rows = [
        {"id": "1", "question": "What floats?", "question_concept": "float", "choices": choices, "answerKey": key}
        for key in ("B", "", "C")
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "qa" / "train.parquet")
    records, bad = both(tmp_path, hub="qa", split="train", format="commonsenseqa")
    question = {"id": "1", "question": "What floats?", "choices": ["boat", "hat"]}
    assert [r.data for r in records] == [{**question, "answer": 1}, question]
    assert [b.where for b in bad] == ["qa/train:3"]
    as_is = fingerprint(Source(hub="qa", split="train"), tmp_path)
    assert as_is != fingerprint(Source(hub="qa", split="train", format="commonsenseqa"), tmp_path)
