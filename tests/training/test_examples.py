"""From records to features: columns, fitted labels, bad records, labels that training never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtserve.errors import ConfigError
from mtserve.text import Text, text_spec
from tests.tiny import EOS, PAD, TOKENIZER_JSON
from tests.training.conftest import rows, write_jsonl
from training.config import TaskConfig
from training.examples import TaskData, read_task

GOOD = rows("classification", 6)


def read(tmp_path: Path, train: list[Any], evaluation: list[Any] | None = None, **extra: Any) -> TaskData:
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "eval.jsonl", GOOD if evaluation is None else evaluation)
    policy = extra.pop("on_bad_record", "stop")
    columns = extra.pop("columns", {})
    raw = {
        "kind": "classification",
        "train": {"path": "train.jsonl", "columns": columns},
        "eval": {"path": "eval.jsonl"},
        "options": {"max_length": 32},
        **extra,
    }
    text = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
    return read_task("topic", TaskConfig.model_validate(raw), text, base=tmp_path, on_bad_record=policy)


def test_labels_are_fitted_on_training_alone_and_other_columns_ignored(tmp_path: Path) -> None:
    data = read(tmp_path, [{**row, "id": 7, "text_pair": None} for row in GOOD], GOOD[:1])
    assert data.options.model_dump()["labels"] == ("bad", "fine", "good")
    assert [target for _, target in data.features] == [2, 0, 1, 2, 0, 1]
    assert (len(data.train), len(data.eval), data.eval.places) == (6, 1, ["eval.jsonl:1"])


def test_given_labels_keep_their_order(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD, options={"labels": ["good", "bad", "fine", "else"]})
    assert [target for _, target in data.features[:3]] == [0, 1, 2]


def test_columns_are_renamed_and_looked_up_inside_objects(tmp_path: Path) -> None:
    train = [{"doc": {"body": row["text"]}, "category": row["label"]} for row in GOOD]
    data = read(tmp_path, train, columns={"text": "doc.body", "label": "category"})
    assert [e.model_dump()["text"] for e in data.train.examples] == [row["text"] for row in GOOD]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: no column 'body'; it has text, label"):
        read(tmp_path, GOOD, columns={"text": "body"})


def test_label_that_training_never_saw(tmp_path: Path) -> None:
    evaluation = [*GOOD, {"text": "one", "label": "odd"}]
    for policy in ("stop", "skip"):
        with pytest.raises(ConfigError, match=r"eval\.jsonl:7: .*'odd' is none that training saw \(bad, fine, good\)"):
            read(tmp_path, GOOD, evaluation, on_bad_record=policy)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"text": "one"}, "label: Field required"),
    ({"text": 3, "label": "good"}, "text: Input should be a valid string"),
    ({"text": "one", "label": ["good", "bad"]}, "label: one label is wanted, found 2"),
    ({"text": "great " * 40, "label": "good"}, "the text has 40 tokens; this task allows 30"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_record_stops_with_file_and_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    options = {"max_length": 32, "on_long": "error"}
    with pytest.raises(ConfigError, match=rf"train\.jsonl:4: {message}"):
        read(tmp_path, [*GOOD[:3], record, *GOOD[3:]], options=options)


def test_bad_records_are_skipped_and_counted(tmp_path: Path) -> None:
    records = [row for pair in zip(GOOD, [record for record, _ in BAD], strict=False) for row in pair]
    options = {"max_length": 32, "on_long": "error"}
    data = read(tmp_path, records, options=options, on_bad_record="skip")
    assert (len(data.train), len(data.features), len(data.train.bad.messages)) == (4, 4, 4)
    assert data.options.model_dump()["labels"] == ("bad", "fine", "good")
    places = [message.split(": ")[0] for message in data.train.bad.messages]
    assert sorted(places) == [f"train.jsonl:{line}" for line in (2, 4, 6, 8)]


def test_no_usable_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.topic\.train has no usable record \(1 bad ones; the first: train"):
        read(
            tmp_path, [{"text": "one", "label": "x"}], options={"labels": ["bad", "fine", "good"]}, on_bad_record="skip"
        )


def test_options_that_the_kind_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.topic\.options\.max_length: .*greater than or equal to 4; found 2"):
        read(tmp_path, GOOD, options={"max_length": 2})
