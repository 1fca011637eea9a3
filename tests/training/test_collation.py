"""Features as batches: what is padded, cut, stacked, left out and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtserve.errors import ConfigError
from mtserve.tasks.base import IGNORED
from training.stock.collation import FeatureCollator

collate = FeatureCollator(pad_id=9)


def test_rows_are_padded_at_the_right_to_the_longest() -> None:
    features = [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 1], "labels": [1, 2, 3]},
        {"input_ids": [4], "attention_mask": [1], "token_type_ids": [1], "labels": [5]},
    ]
    batch = {name: tensor.tolist() for name, tensor in collate(features).items()}
    assert batch == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 0, 1], [1, 0, 0]],
        "labels": [[1, 2, 3], [5, IGNORED, IGNORED]],
    }


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_padding_that_features_bring_is_cut_to_the_longest_row(form: Any) -> None:
    """Defect 51: the features of the write-ups are all 128 tokens long, at 15 real ones."""
    rows = [([1, 2, 7, 7, 7], [1, 1, 0, 0, 0], 1), ([3, 4, 5, 7, 7], [1, 1, 1, 0, 0], 0)]
    features = [{"input_ids": form(ids), "attention_mask": form(mask), "labels": label} for ids, mask, label in rows]
    batch = collate(features)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]


def test_rows_without_a_mask_get_one_from_their_lengths() -> None:
    assert collate([{"input_ids": [1, 9]}, {"input_ids": [1]}])["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_choices_of_any_length_become_a_third_axis() -> None:
    features = [
        {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]], "labels": 1},
        {"input_ids": [[4], [5, 6, 7]], "attention_mask": [[1], [1, 1, 1]], "labels": 0},
    ]
    batch = collate(features)
    assert batch["input_ids"].tolist() == [[[1, 2, 9], [3, 9, 9]], [[4, 9, 9], [5, 6, 7]]]
    assert (batch["attention_mask"].shape, batch["labels"].tolist()) == ((2, 2, 3), [1, 0])


def test_the_length_may_be_a_multiple() -> None:
    assert FeatureCollator(pad_id=9, multiple_of=8)([{"input_ids": [1] * 9}])["input_ids"].shape == (1, 16)


def test_labels_keep_their_kind_and_strings_are_left_out() -> None:
    rows = [{"input_ids": [1], "text": "a"}, {"input_ids": [2], "text": "b"}]
    whole = collate([{**row, "labels": label} for row, label in zip(rows, (1, 0), strict=True)])
    mixed = collate([{**row, "labels": label} for row, label in zip(rows, (5, 4.5), strict=True)])
    many = collate([{**row, "labels": [0.0, 1.0]} for row in rows])
    assert set(whole) == {"input_ids", "attention_mask", "labels"}
    assert [batch["labels"].dtype for batch in (whole, mixed, many)] == [torch.int64, torch.float32, torch.float32]
    assert (mixed["labels"].tolist(), many["labels"].tolist()) == ([5.0, 4.5], [[0.0, 1.0], [0.0, 1.0]])


def test_features_without_text_are_stacked() -> None:
    batch = collate([{"x": np.zeros(10), "y": 1}, {"x": np.ones(10), "y": 0}])
    assert (batch["x"].shape, batch["x"].dtype, batch["y"].tolist()) == ((2, 10), torch.float32, [1, 0])


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (
            [{"input_ids": [1], "labels": 1}, {"input_ids": [1]}],
            "feature 1 of the batch has no labels; it has input_ids",
        ),
        ([{"input_ids": [[1], [2]]}, {"input_ids": [[1]]}], r"different numbers of choices: \[1, 2\]"),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            r"row 0 of the batch has 2 ids, but attention_mask of the shape",
        ),
        ([{"x": [1, 2]}, {"x": [1]}], r"x has different shapes in one batch: \[\(1,\), \(2,\)\]"),
        (
            [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}],
            r"row 1 of the batch, ids \[5, 6\] …, has no label that counts; was its target cut\?",
        ),
        (
            [{"input_ids": [5, 6], "attention_mask": [1, 0], "labels": [IGNORED, 6]}],
            r"row 0 of the batch, ids \[5, 6\] …, has no label that counts",
        ),
    ],
)
def test_what_makes_no_batch_is_said(features: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        collate(features)
