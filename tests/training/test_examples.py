"""From records to features: columns, fitted labels, bad records, labels that training never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mtserve.errors import ConfigError
from mtserve.tasks import KINDS
from mtserve.text import Text, text_spec
from tests.tiny import EOS, PAD, TOKENIZER_JSON
from tests.training.conftest import rows, write_jsonl
from training.config import TaskConfig
from training.data import records
from training.data.splits import TaskData, read_task

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
    config = TaskConfig.model_validate(raw)
    return read_task("topic", config, text, base=tmp_path, on_bad_record=policy, tokenizer_json=TOKENIZER_JSON)


def test_labels_are_fitted_on_training_alone_and_other_columns_ignored(tmp_path: Path) -> None:
    data = read(tmp_path, [{**row, "id": 7, "text_pair": None} for row in GOOD], GOOD[:1])
    assert data.options.model_dump()["labels"] == ("bad", "fine", "good")
    assert [target for _, target in data.train.features] == [2, 0, 1, 2, 0, 1]
    assert (len(data.train), len(data.eval), data.eval.places) == (6, 1, ["eval.jsonl:1"])


def test_given_labels_keep_their_order(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD, options={"labels": ["good", "bad", "fine", "else"]})
    assert [target for _, target in data.train.features[:3]] == [0, 1, 2]


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
    assert (len(data.train), len(data.train.features), len(data.train.bad.messages)) == (4, 4, 4)
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


def test_tables_have_classes_and_give_the_same_features_as_the_kind(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD)
    assert data.train.table.features["label"].names == ["bad", "fine", "good"]
    assert data.eval.table.features["label"].names == ["bad", "fine", "good"]
    text = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
    for example, (got, target) in zip(data.train.examples, data.train.features, strict=True):
        expected, truth = data.kind.features(example, data.options, text)
        assert [row.key for row in got] == [row.key for row in expected]
        assert [row.own_tokens for row in got] == [row.own_tokens for row in expected]
        assert target == truth


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("classification", {"max_length": 32}),
        ("similarity", {"max_length": 32, "high": 5}),
        ("multiple_choice", {"max_length": 32}),
        ("token_classification", {"max_length": 32, "on_long": "window", "stride": 1}),
        ("generation", {"max_length": 32, "max_new_tokens": 4, "template": "{source} [SEP]{target}"}),
    ],
)
def test_examples_and_targets_of_every_kind_come_back_from_the_table(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    raw = rows(kind, 5)
    data = read(tmp_path, raw, raw, kind=kind, options=options)
    text = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
    expected = [KINDS[kind].labelled.model_validate(row) for row in raw]
    assert list(data.train.examples) == expected
    for example, (got, target) in zip(expected, data.train.features, strict=True):
        wanted, truth = KINDS[kind].features(example, data.options, text)
        assert [row.key for row in got] == [row.key for row in wanted]
        np.testing.assert_equal(target, truth)
    assert data.train.lengths == [sum(len(row) for row in got) for got, _ in data.train.features]


def test_several_labels_come_back_from_the_table(tmp_path: Path) -> None:
    raw = [{"text": "one", "label": ["good", "bad"]}, {"text": "two", "label": []}, {"text": "red", "label": "bad"}]
    data = read(tmp_path, raw, raw, options={"max_length": 32, "multi_label": True})
    assert [target.tolist() for _, target in data.train.features] == [[1, 1], [0, 0], [1, 0]]
    assert [example.model_dump()["label"] for example in data.train.examples] == [("good", "bad"), (), ("bad",)]


def test_a_second_run_reads_and_tokenises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode, reader = Text._encode, records.read

    def counted(self: Text, *arguments: Any) -> Any:
        calls.append(arguments)
        return encode(self, *arguments)

    monkeypatch.setattr(Text, "_encode", counted)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "tables")
    first = read(tmp_path, GOOD)
    assert len(calls) >= 12
    calls.clear()
    monkeypatch.setattr(records, "read", lambda *_: pytest.fail("the file was read again"))
    second = read(tmp_path, GOOD)
    monkeypatch.setattr(records, "read", reader)
    assert not calls
    assert [row.key for (made, _) in second.train.features for row in made] == [
        row.key for (made, _) in first.train.features for row in made
    ]
    read(tmp_path, GOOD, options={"max_length": 31})
    assert len(calls) >= 12, "other options make other rows"
    calls.clear()
    read(tmp_path, [*GOOD[:5], {"text": "another", "label": "bad"}])
    assert calls, "other data make other rows"


def test_carved_splits_are_disjoint_follow_the_seed_and_keep_groups_whole(tmp_path: Path) -> None:
    raw = [{"text": f"{number} one", "label": "good", "review": number // 3} for number in range(600)]
    held = {"carve": 0.1, "seed": 0, "by": "review"}
    whole = {"options": {"max_length": 32, "labels": ["good"]}, "eval": held, "test": {**held, "carve": 0.2}}
    data = read(tmp_path, raw, **whole)
    assert data.test is not None
    sizes = {which: len(split) for which, split in data.splits.items()}
    assert sizes == {"train": 396, "eval": 69, "test": 135}, "about 7, 1 and 2 tenths"
    texts = {
        which: {int(e.model_dump()["text"].split()[0]) // 3 for e in split.examples}
        for which, split in data.splits.items()
    }
    assert not texts["train"] & texts["eval"] | texts["train"] & texts["test"] | texts["eval"] & texts["test"]
    assert set.union(*texts.values()) == set(range(200))
    again = read(tmp_path, raw, **whole)
    assert list(again.eval.examples) == list(data.eval.examples)
    fewer = read(tmp_path, raw[100:400:2], **whole)
    seen = {example.text for example in data.eval.examples}
    assert {example.text for example in fewer.eval.examples} == seen & {record["text"] for record in raw[100:400:2]}
    other = read(tmp_path, raw, **{**whole, "eval": {**held, "seed": 1}, "test": {**held, "seed": 1, "carve": 0.2}})
    assert list(other.eval.examples) != list(data.eval.examples)
    with pytest.raises(ConfigError, match="no column 'page' to group by; it has text, label, review"):
        read(tmp_path, raw, **{**whole, "eval": {**held, "by": "page"}, "test": {**held, "by": "page"}})


def test_a_part_that_is_kept_out_is_in_no_split(tmp_path: Path) -> None:
    raw = [{"text": f"{number} one", "label": "good"} for number in range(200)]
    rest: dict[str, Any] = {"options": {"max_length": 32, "labels": ["good"]}}

    def texts(**held: Any) -> dict[str, set[str]]:
        return {
            which: {e.text for e in split.examples}
            for which, split in read(tmp_path, raw, **rest, **held).splits.items()
        }

    final = texts(eval={"carve": 0.1, "seed": 3})
    tuned = texts(eval={"carve": 0.2, "seed": 3, "skip": 0.1}, test={"carve": 0.3, "seed": 3, "skip": 0.1})
    assert {which: len(found) for which, found in tuned.items()} == {"train": 80, "eval": 40, "test": 60}
    assert not final["eval"] & set.union(*tuned.values())
    assert set.union(*tuned.values()) == final["train"]
    assert len(tuned["eval"] & tuned["test"]) == 0


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"eval": {"carve": 1.5}}, r"less than 1"),
        ({"eval": {"carve": 0.5}, "test": {"carve": 0.5}}, "leave nothing"),
        ({"eval": {"carve": 0.5, "skip": 0.5}}, "leave nothing"),
        ({"eval": {"carve": 0.1, "seed": 1}, "test": {"carve": 0.1}}, "other seeds, groups or skip"),
        ({"eval": {"carve": 0.1, "skip": 0.1}, "test": {"carve": 0.1}}, "other seeds, groups or skip"),
    ],
)
def test_carving_that_cannot_be(tmp_path: Path, held: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read(tmp_path, GOOD, **held)
