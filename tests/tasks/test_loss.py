"""Loss terms of each kind against PyTorch and by hand, and class weights against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from mtserve.errors import ConfigError
from mtserve.rows import Row, make_row
from mtserve.tasks import KINDS
from mtserve.tasks.base import IGNORED, PLAIN, LossTerms
from training.trainer.weighing import loss_terms, weights_of_classes

LABELS = ("a", "b", "c")
OPTIONS: dict[str, dict[str, Any]] = {
    "classification": {"labels": LABELS},
    "multi": {"labels": LABELS, "multi_label": True},
    "token_classification": {"labels": ["x"]},
    "multiple_choice": {},
    "generation": {},
    "similarity": {},
}
SMOOTH = LossTerms(label_smoothing=0.2)
WEIGHED = LossTerms(class_weights=(1.0, 2.0, 5.0))
BOTH = LossTerms(0.2, (1.0, 2.0, 5.0))


def row(length: int = 3, part: int = 0) -> Row:
    made = make_row(range(length), [0] * length, [(0, 0)] * length, [False] * length)
    return Row(made.ids, made.type_ids, made.offsets, made.special, part=part)


def kind_of(name: str) -> Any:
    return KINDS["classification" if name == "multi" else name]


def options_of(name: str) -> Any:
    return kind_of(name).options.model_validate(OPTIONS[name])


def loss(name: str, logits: torch.Tensor, rows: Any, targets: Any, terms: LossTerms = PLAIN) -> torch.Tensor:
    return kind_of(name).loss(logits, rows, targets, options_of(name), terms)


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("terms", [PLAIN, SMOOTH, WEIGHED, BOTH])
def test_classification_is_torchs_mean(terms: LossTerms) -> None:
    found = loss("classification", logits(4, 3), [[row()]] * 4, [0, 2, 2, 1], terms)
    weight = torch.tensor(terms.class_weights) if terms.class_weights else None
    wanted = torch.tensor([0, 2, 2, 1])
    assert torch.equal(
        found, functional.cross_entropy(logits(4, 3), wanted, weight, label_smoothing=terms.label_smoothing)
    )


def test_the_weighted_mean_is_over_the_weights_of_the_targets() -> None:
    each = functional.cross_entropy(logits(3, 3), torch.tensor([0, 1, 1]), reduction="none")
    by_hand = (1 * each[0] + 2 * each[1] + 2 * each[2]) / 5
    torch.testing.assert_close(loss("classification", logits(3, 3), [[row()]] * 3, [0, 1, 1], WEIGHED), by_hand)


def test_several_labels_at_once() -> None:
    targets = [np.array(t, np.float32) for t in ([1, 0, 1], [0, 0, 1])]
    wanted = torch.tensor(np.stack(targets))
    plain = loss("multi", logits(2, 3), [[row()]] * 2, targets)
    assert torch.equal(plain, functional.binary_cross_entropy_with_logits(logits(2, 3), wanted))
    each = functional.binary_cross_entropy_with_logits(logits(2, 3), wanted * 0.8 + 0.1, reduction="none")
    found = loss("multi", logits(2, 3), [[row()]] * 2, targets, BOTH)
    torch.testing.assert_close(found, (each * torch.tensor([1.0, 2.0, 5.0])).sum() / 6)


@pytest.mark.parametrize("terms", [PLAIN, SMOOTH, WEIGHED, BOTH])
def test_tokens_that_count_in_no_loss_have_no_weight(terms: LossTerms) -> None:
    targets = [[np.array([IGNORED, 2, 0])], [np.array([1, IGNORED])]]
    found = loss("token_classification", logits(2, 4, 3), [[row()], [row(2)]], targets, terms)
    wanted = torch.tensor([[IGNORED, 2, 0, IGNORED], [1, IGNORED, IGNORED, IGNORED]]).flatten()
    weight = torch.tensor(terms.class_weights) if terms.class_weights else None
    theirs = functional.cross_entropy(
        logits(2, 4, 3).flatten(0, 1), wanted, weight, label_smoothing=terms.label_smoothing
    )
    torch.testing.assert_close(found, theirs)


@pytest.mark.parametrize("terms", [PLAIN, SMOOTH, WEIGHED, BOTH])
def test_a_batch_without_a_counted_token_costs_nothing(terms: LossTerms) -> None:
    made = logits(1, 3, 3).requires_grad_()
    found = loss("token_classification", made, [[row()]], [[np.full(3, IGNORED)]], terms)
    found.backward()
    assert found.item() == 0
    assert made.grad is not None
    assert not made.grad.any()


def test_generation_smooths_over_the_vocabulary() -> None:
    target = np.array([IGNORED, 5, 1])
    found = loss("generation", logits(1, 3, 9), [[row()]], [target], SMOOTH)
    theirs = functional.cross_entropy(logits(1, 3, 9)[0], torch.tensor(target), label_smoothing=0.2)
    torch.testing.assert_close(found, theirs)


def test_multiple_choice_smooths_over_the_choices_of_the_example() -> None:
    rows = [[row(part=0), row(part=1)], [row(part=0), row(part=1), row(part=2)]]
    scores = logits(5, 1)
    log_p = [torch.log_softmax(part[:, 0], 0) for part in (scores[:2], scores[2:])]
    by_hand = sum(-0.8 * p[t] - 0.2 * p.mean() for p, t in zip(log_p, (1, 2), strict=True)) / 2
    torch.testing.assert_close(loss("multiple_choice", scores, rows, [1, 2], SMOOTH), by_hand)
    plain = -(log_p[0][1] + log_p[1][2]) / 2
    torch.testing.assert_close(loss("multiple_choice", scores, rows, [1, 2]), plain)


def test_class_weights_are_scikit_learns_balanced_ones() -> None:
    targets = [0, 0, 0, 1, 0, 2]
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=np.array(targets))
    assert weights_of_classes("balanced", LABELS, targets=targets) == pytest.approx(tuple(theirs))


def test_balanced_weights_count_labels_tags_and_only_classes_that_occur() -> None:
    multi = [np.array([1, 0, 1], np.float32), np.array([1, 0, 0], np.float32), np.array([1, 0, 0], np.float32)]
    assert weights_of_classes("balanced", LABELS, targets=multi) == (4 / (2 * 3), 1.0, 4 / 2)
    tags = [[np.array([IGNORED, 0, 0, 1]), np.array([IGNORED])], [np.array([0, IGNORED])]]
    assert weights_of_classes("balanced", ("O", "B-x", "I-x"), targets=tags) == (4 / (2 * 3), 4 / 2, 1.0)
    assert weights_of_classes("balanced", LABELS, targets=[]) == (1.0, 1.0, 1.0)


def test_named_weights_leave_the_other_classes_at_one() -> None:
    found = loss_terms(
        kind_of("classification"),
        options_of("classification"),
        targets=[],
        label_smoothing=0.1,
        class_weights={"b": 3},
    )
    assert found == LossTerms(0.1, (1.0, 3.0, 1.0))


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("classification", {"class_weights": {"z": 1}}, "unknown class 'z'; allowed: a, b, c"),
        ("classification", {"class_weights": {"a": 0}}, r"class_weights.a must be a positive number; found 0"),
        ("classification", {"class_weights": {"a": math.inf}}, "found inf"),
        ("token_classification", {"class_weights": {"x": 2}}, "unknown class 'x'; allowed: O, B-x, I-x"),
        (
            "multiple_choice",
            {"class_weights": "balanced"},
            "multiple_choice cannot use it; it can use: label_smoothing, r_drop",
        ),
        ("similarity", {"label_smoothing": 0.1}, "similarity cannot use it; it can use: r_drop"),
        ("classification", {"label_smoothing": 1.0}, "less than 1; found 1.0"),
    ],
)
def test_terms_that_a_task_cannot_use_are_refused(name: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loss_terms(kind_of(name), options_of(name), targets=[], **asked)
