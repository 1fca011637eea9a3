"""Data sets of the hub by configuration, split and column map, against local folders with the same features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Features, Value

from mtserve.errors import ConfigError
from mtserve.tasks import KINDS
from tests.training.readers.helpers import both, good

PAIR = {"sentence1": Value("string"), "sentence2": Value("string"), "idx": Value("int32")}
README = """---
configs:
- config_name: stsb
  data_files: [{split: train, path: stsb/train.parquet}, {split: test, path: stsb/test.parquet}]
- config_name: rte
  data_files: [{split: train, path: rte/train.parquet}, {split: test, path: rte/test.parquet}]
---
"""


@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    labels = {
        "stsb": (Value("float32"), [3.8, -1.0]),
        "rte": (ClassLabel(names=["entailment", "not_entailment"]), [1, -1]),
    }
    for config, (feature, (train, test)) in labels.items():
        (tmp_path / "glue" / config).mkdir(parents=True)
        for split, label in (("train", train), ("test", test)):
            row = {"sentence1": ["One."], "sentence2": ["Two."], "idx": [0], "label": [label]}
            table = datasets.Dataset.from_dict(row, features=Features({**PAIR, "label": feature}))
            table.to_parquet(tmp_path / "glue" / config / f"{split}.parquet")
    (tmp_path / "glue" / "README.md").write_text(README)
    return tmp_path


def fields(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {name: row[column] for name, column in columns.items()}


def test_glue_stsb(glue: Path) -> None:
    columns = {"text": "sentence1", "text_pair": "sentence2", "score": "label"}
    (row,) = good(glue, hub="glue", config="stsb", split="train", columns=columns)
    example = KINDS["similarity"].labelled.model_validate(fields(row, columns))
    assert example.model_dump()["score"] == pytest.approx(3.8)


def test_glue_rte_names_its_classes_and_has_no_label_in_its_test_split(glue: Path) -> None:
    columns = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
    (row,) = good(glue, hub="glue", config="rte", split="train", columns=columns)
    assert KINDS["classification"].labelled.model_validate(fields(row, columns)).model_dump() == {
        "text": "One.",
        "text_pair": "Two.",
        "label": "not_entailment",
    }
    assert good(glue, hub="glue", config="rte", split="test")[0]["label"] is None


def test_what_is_not_there(glue: Path) -> None:
    for missing in ({"config": "cola", "split": "train"}, {"config": "rte", "split": "dev"}):
        with pytest.raises(ConfigError, match=f"glue/{missing['config']}/{missing['split']} cannot be read: "):
            both(glue, hub="glue", **missing)
