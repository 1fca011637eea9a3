"""Rows that fail, settings that cannot be, and rows that are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtserve.engine import Engine
from mtserve.errors import ConfigError, UnknownTaskError
from mtserve.score.run import TooManyErrorsError
from tests.labelled import rows
from tests.score.test_run import lines, scored, table, texts, write
from tests.tiny import tiny


@pytest.fixture(scope="module")
def encoder() -> Engine:
    return tiny("bert").engine


BAD = [
    {"id": 0, "text": "good"},
    {"id": 1, "text": 7},
    {"id": 2},
    {"id": 3, "text": "bad", "text_pair": "fine"},
    {"id": 4, "text": "fine"},
]


def test_bad_rows_are_told_and_harm_no_other(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", BAD)
    with source.open("a") as file:
        file.write("torn {")
    summary = scored(encoder, source, tmp_path / "out.jsonl", "topic", "score")
    found = lines(tmp_path / "out.jsonl")
    assert [row.get("id") for row in found] == [0, 1, 2, 3, 4, None]
    assert [(row["topic"] is None, row["score"] is None) for row in found] == [
        *[(False, True), (True, True), (True, True), (False, False), (False, True), (True, True)]
    ]
    assert summary.counts["errors"] == 5
    assert found[1]["error"]["code"] == "invalid_input"
    assert found[0]["error"]["message"] == "task 'score': text_pair: Field required"
    assert found[5]["error"]["message"].startswith("not JSON")
    assert [row["error"] and (row["error"]["row"], row["error"]["file"]) for row in found][5] == (5, "in.jsonl")
    assert found[3]["error"] is None


def test_bad_rows_apart(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", BAD * 3)
    scored(encoder, source, tmp_path / "out.csv", "topic", errors=str(tmp_path / "bad.jsonl"), keep=("id",))
    assert [row["id"] for row in table(tmp_path / "out.csv")] == ["0", "3", "4"] * 3
    found = lines(tmp_path / "bad.jsonl")
    assert [(row["id"], row["error"]["row"]) for row in found] == [(1, 1), (2, 2), (1, 6), (2, 7), (1, 11), (2, 12)]


def test_too_many_errors_stop_a_run_that_can_go_on(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", BAD * 4)
    with pytest.raises(TooManyErrorsError, match="4 rows failed; at most 3 may"):
        scored(encoder, source, tmp_path / "out.jsonl", "topic", max_errors=3)
    assert not (tmp_path / "out.jsonl").exists()
    summary = scored(encoder, source, tmp_path / "out.jsonl", "topic", max_errors=8)
    assert (summary.reused, summary.counts["rows"], summary.counts["errors"]) == (5, 20, 8)


def test_a_later_row_that_does_not_fit_the_table(encoder: Engine, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mtserve.score.plan._LOOK", 2)
    records: list[dict[str, Any]] = [{"text": "good", "n": n} for n in (1, 2, 3)]
    source = write(tmp_path / "in.jsonl", [*records, {"text": "bad", "n": "four"}, {"text": "fine", "new": 1}])
    summary = scored(encoder, source, tmp_path / "out.parquet", "topic")
    found = table(tmp_path / "out.parquet")
    assert [row["n"] for row in found] == [1, 2, 3, None, None]
    assert "not of its column's type" in found[3]["error_message"]
    assert "the output has no column new" in found[4]["error_message"]
    assert summary.counts["errors"] == 2


@pytest.mark.parametrize(
    ("tasks", "more", "said"),
    [
        (("topic",), {"columns": {"txet": "a"}}, "no task has a field txet; allowed: label, text"),
        (("topic",), {"columns": {"text": "body"}}, "task 'topic': there is no column body; the row has id, text"),
        (("choice",), {}, "task 'choice': no column for question; the input has id, text; name one: question=COLUMN"),
        ((), {}, "choose --task from topic, tags"),
        (("topic",), {"metrics": True}, "task 'topic': no column for label"),
    ],
)
def test_settings_that_cannot_be(
    encoder: Engine, tmp_path: Path, tasks: tuple[str, ...], more: dict[str, Any], said: str
) -> None:
    source = write(tmp_path / "in.jsonl", texts(2))
    with pytest.raises(ConfigError, match=said):
        scored(encoder, source, tmp_path / "out.jsonl", *tasks, **more)
    with pytest.raises(UnknownTaskError):
        scored(encoder, source, tmp_path / "out.jsonl", "tpoic")
    with pytest.raises(ConfigError, match="csv has no nested columns"):
        scored(encoder, source, tmp_path / "out.csv", "topic", form="nested")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_column_that_has_a_tasks_name(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "good", "topic": "mine"}])
    with pytest.raises(ConfigError, match="input and output both have a column topic"):
        scored(encoder, source, tmp_path / "out.jsonl", "topic")
    scored(encoder, source, tmp_path / "out.jsonl", "topic", keep=("text",))
    scored(encoder, source, tmp_path / "flat.jsonl", "topic", form="flat")


@pytest.mark.parametrize("task", ["topic", "score", "choice", "names"])
def test_metrics_are_those_of_training(encoder: Engine, tmp_path: Path, task: str) -> None:
    records = rows(tiny("bert", only=(task,)), task, 11)
    wrong = [{**records[0], **({"label": "unheard"} if "label" in records[0] else {})}, *records[1:]]
    source = write(tmp_path / "in.jsonl", wrong)
    summary = scored(encoder, source, tmp_path / "out.jsonl", task, metrics=True, keep=())
    kind, options = encoder.task(task).kind, encoder.task(task).options
    used = records[1:] if task == "topic" else records
    examples = [kind.labelled.model_validate(row) for row in used]
    predictions = encoder.predict(task, [kind.unlabelled(one) for one in examples])
    assert summary.metrics[task] == pytest.approx(kind.metrics(predictions, examples, options))
    assert summary.counts["labelled"] == len(used)
