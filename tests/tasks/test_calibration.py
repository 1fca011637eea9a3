"""Temperatures, thresholds and calibration error, against truths that are known or found by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import mtserve
from mtserve.checkpoint import Checkpoint
from mtserve.decisions import flipped
from mtserve.tasks import KINDS
from mtserve.tasks.calibration import by_class, by_label, error_of
from mtserve.tasks.classification import ClassificationOptions
from tests.tiny import tiny, write_checkpoint

LABELS = ("a", "b", "c")


def softmax(logits: Any) -> Any:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def drawn(size: int, classes: int, seed: int = 0) -> tuple[Any, Any]:
    """Logits, and truths that are as likely as these say."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (size, classes))
    return logits, np.array([rng.choice(classes, p=p) for p in softmax(logits)])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_in_comes_out(temperature: float) -> None:
    logits, true = drawn(6000, 4)
    found = by_class(softmax(logits * temperature), true)
    assert found.options["temperature"] == pytest.approx(temperature, rel=0.08)
    assert found.after < 0.025
    if temperature != 1:
        assert found.before > 3 * found.after


def test_classes_that_an_example_lacks_take_no_part() -> None:
    logits, true = drawn(4000, 3)
    wide = np.zeros((4000, 5))
    wide[:, :3] = softmax(logits * 2)
    assert by_class(wide, true) == by_class(softmax(logits * 2), true)


def test_labels_for_themselves() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (5000, 3))
    true = (rng.random((5000, 3)) < 1 / (1 + np.exp(-logits))).astype(int)
    found = by_label(1 / (1 + np.exp(-logits * 2.5)), true)
    assert found.options["temperature"] == pytest.approx(2.5, rel=0.08)
    assert found.after < 0.02 < found.before
    assert len(found.options["thresholds"]) == 3


def test_a_threshold_is_that_of_the_best_f1() -> None:
    """Against all thresholds in turn."""
    rng = np.random.default_rng(2)
    scores = np.round(rng.random((300, 1)), 2)
    true = (rng.random((300, 1)) < scores**2).astype(int)
    found = by_label(scores, true)
    (limit,), warmth = found.options["thresholds"], found.options["temperature"]
    kept = scores.clip(1e-7, 1 - 1e-7)
    warm = 1 / (1 + np.exp(-np.log(kept / (1 - kept)) / warmth))

    def f1(at: float) -> float:
        given = warm >= at
        return float(2 * (given & (true > 0)).sum() / (given.sum() + true.sum()))

    assert f1(limit) == pytest.approx(max(f1(at) for at in np.unique(warm)), abs=1e-9)


def test_a_label_that_is_never_true_keeps_its_threshold() -> None:
    assert by_label(np.full((10, 1), 0.9), np.zeros((10, 1), int)).options["thresholds"] == (0.5,)


def test_the_error_by_hand() -> None:
    sure = np.array([0.95, 0.95, 0.55, 0.55])
    assert error_of(sure, np.array([1, 0, 1, 1])) == pytest.approx((2 * 0.45 + 2 * 0.45) / 4)
    assert error_of(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def test_a_single_example_changes_nothing() -> None:
    assert by_class(np.array([[0.7, 0.3]]), np.array([0])).options == {"temperature": 1.0}


@pytest.mark.parametrize("raw", [{"thresholds": [0.5]}, {"multi_label": True, "thresholds": [0.5]}, {"temperature": 0}])
def test_options_that_do_not_fit_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClassificationOptions.model_validate({"labels": LABELS, **raw})


def test_what_is_in_the_options_is_in_the_answers(tmp_path: Path) -> None:
    raw: dict[str, Any] = {"labels": ["a", "b", "c"], "max_length": 32}
    fitted = {"temperature": 4.0, "thresholds": [0.001, 0.999, 0.001]}
    tasks = {
        "one": ("classification", raw),
        "many": ("classification", {**raw, "multi_label": True}),
        "warm": ("classification", {**raw, "temperature": 4.0}),
        "held": ("classification", {**raw, "multi_label": True, **fitted}),
        "pick": ("multiple_choice", {"max_length": 32}),
        "cool": ("multiple_choice", {"max_length": 32, "temperature": 0.25}),
    }
    small = tiny("bert", tasks=tasks)
    for name, other in (("warm", "one"), ("held", "many"), ("cool", "pick")):
        small.model.head(name).load_state_dict(small.model.head(other).state_dict())
    write_checkpoint(tmp_path / "x", small)
    engine = mtserve.load(tmp_path / "x")

    def scores(task: str, item: Any, **parameters: Any) -> Any:
        return {one.get("label", one.get("index")): one["score"] for one in engine.predict(task, [item], parameters)[0]}

    raw_logits = scores("warm", "the town", function_to_apply="none")
    assert raw_logits == scores("one", "the town", function_to_apply="none")
    values = np.array([list(raw_logits.values())])
    np.testing.assert_allclose(list(scores("warm", "the town").values()), softmax(values / 4)[0], atol=1e-6)
    many = scores("many", "the town", function_to_apply="none")
    held = scores("held", "the town")
    for label, logit in many.items():
        assert held[label] == pytest.approx(1 / (1 + np.exp(-logit / 4)), abs=1e-6)
    assert set(scores("held", "the town", decided=True)) == {"a", "c"}
    assert set(scores("many", "the town", decided=True)) == {label for label, logit in many.items() if logit >= 0}
    choice = {"question": "what rain", "choices": ["red", "green"]}
    plain, cool = scores("pick", choice), scores("cool", choice)
    assert np.log(cool[0] / cool[1]) == pytest.approx(4 * np.log(plain[0] / plain[1]), rel=1e-3)
    options = Checkpoint.open(tmp_path / "x").task("held").parsed_options
    likely, unlikely = ([{"label": "b", "score": score}] for score in (0.9995, 0.9))
    assert flipped(likely, unlikely, options)
    metrics = KINDS["classification"].metrics
    truth = KINDS["classification"].labelled.model_validate({"text": "x", "label": ["b"]})
    assert metrics([likely], [truth], options)["accuracy"] == 1
    assert metrics([unlikely], [truth], options)["accuracy"] == 0


def test_a_temperature_of_tags_changes_scores_and_no_span() -> None:
    raw: dict[str, Any] = {"labels": ["a", "b", "c", "d", "e"], "max_length": 32}
    tasks = {"plain": ("token_classification", raw), "warm": ("token_classification", {**raw, "temperature": 3.0})}
    small = tiny("bert", tasks=tasks)
    small.model.head("warm").load_state_dict(small.model.head("plain").state_dict())
    texts = ["ana silva moved from porto", "the town has rain"]
    plain, warm = (small.engine.predict(name, texts) for name in tasks)
    every = [list(zip(one, other, strict=True)) for one, other in zip(plain, warm, strict=True)]
    assert any(every)
    for one, other in (pair for of_text in every for pair in of_text):
        assert {**one, "score": 0} == {**other, "score": 0}
        assert one["score"] != other["score"]
