"""Metrics and reports of each kind against scikit-learn, scipy and seqeval, once and under many weightings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import classification_report as span_report
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score, matthews_corrcoef

from mtserve.tasks import KINDS
from mtserve.tasks.spans import tags_to_spans

LABELS = ["a", "b", "c", "d", "rare"]
SPANS = ["LOC", "ORG", "PER"]


def made(kind: str, raw: dict[str, Any], records: list[dict[str, Any]]) -> tuple[Any, Any, list[Any]]:
    handler = KINDS[kind]
    return handler, handler.options.model_validate(raw), [handler.labelled.model_validate(r) for r in records]


def single(seed: int, size: int = 60) -> tuple[Any, Any, list[Any], list[Any]]:
    """A random single-label task whose last label never occurs, and whose last but one is never true."""
    rng = np.random.default_rng(seed)
    true, guess = rng.choice(LABELS[:3], size), rng.choice(LABELS[:4], size)
    handler, options, examples = made("classification", {"labels": LABELS}, [{"text": "", "label": t} for t in true])
    return handler, options, examples, [[{"label": str(g), "score": 1.0}] for g in guess]


@pytest.mark.parametrize("seed", range(5))
def test_single_label_metrics_are_those_of_scikit_learn(seed: int) -> None:
    handler, options, examples, predictions = single(seed)
    true, guess = [e.label for e in examples], [p[0]["label"] for p in predictions]
    assert handler.metrics(predictions, examples, options) == {
        "accuracy": pytest.approx(accuracy_score(true, guess)),
        "macro_f1": pytest.approx(f1_score(true, guess, average="macro")),
        "mcc": pytest.approx(matthews_corrcoef(true, guess)),
    }
    theirs = classification_report(true, guess, labels=LABELS, output_dict=True, zero_division=0)
    report = handler.report(predictions, examples, options)
    assert list(report) == LABELS
    for label, ours in report.items():
        assert list(ours.values()) == pytest.approx(list(theirs[label].values()))
    assert handler.confusion(predictions, examples, options) == confusion_matrix(true, guess, labels=LABELS).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_multi_label_metrics_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, scores = rng.integers(2, size=(40, 4)), rng.random((40, 4))
    sets = [[LABELS[i] for i in np.flatnonzero(row)] for row in true]
    raw = {"labels": LABELS[:4], "multi_label": True}
    handler, options, examples = made("classification", raw, [{"text": "", "label": one} for one in sets])
    predictions = [[{"label": name, "score": s} for name, s in zip(LABELS, row, strict=False)] for row in scores]
    guess = (scores >= 0.5).astype(int)
    assert handler.metrics(predictions, examples, options) == {
        "accuracy": pytest.approx(accuracy_score(true, guess)),
        "macro_f1": pytest.approx(f1_score(true, guess, average="macro")),
        "micro_f1": pytest.approx(f1_score(true, guess, average="micro")),
    }
    assert handler.confusion(predictions, examples, options) is None
    theirs = classification_report(true, guess, output_dict=True, zero_division=0)
    report = handler.report(predictions, examples, options)
    assert [r["f1"] for r in report.values()] == pytest.approx([theirs[str(i)]["f1-score"] for i in range(4)])


def test_one_label_alone_correlates_with_nothing() -> None:
    handler, options, examples = made("classification", {"labels": LABELS}, [{"text": "", "label": "a"}] * 3)
    found = handler.metrics([[{"label": "a", "score": 1.0}]] * 3, examples, options)
    assert found == {"accuracy": 1.0, "macro_f1": 1.0, "mcc": 0.0}


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    guess, true = rng.random(50).round(1), rng.integers(6, size=50).astype(float)  # both with equal values
    records = [{"text": "", "text_pair": "", "score": t} for t in true]
    handler, options, examples = made("similarity", {"high": 5}, records)
    found = handler.metrics([{"score": g} for g in guess], examples, options)
    expected = {"pearson": pearsonr(guess, true)[0], "spearman": spearmanr(guess, true)[0]}
    assert found == {name: pytest.approx(float(value)) for name, value in expected.items()}


def test_correlations_of_nearly_constant_scores_stay_numbers() -> None:
    records = [{"text": "", "text_pair": "", "score": t} for t in (0.1, 0.2, 0.7)]
    handler, options, examples = made("similarity", {}, records)
    for scores in ([0.3, 0.3, np.nextafter(0.3, 1)], [0.1 + 0.2] * 3, [0.0, 0.0, 5e-324]):
        found = handler.metrics([{"score": float(s)} for s in scores], examples, options)
        assert all(-1 <= value <= 1 for value in found.values())


def spans(seed: int, size: int = 60) -> tuple[Any, Any, list[Any], list[Any], list[list[str]], list[list[str]]]:
    """Random true tags (valid) and given tags (any, so often broken), as words."""
    rng = np.random.default_rng(seed)
    tags = ["O", *(f"{prefix}-{label}" for label in SPANS for prefix in "BI")]
    true, guess = [], []
    for _ in range(size):
        drawn = rng.choice(tags, rng.integers(1, 12)).tolist()
        for at, before in enumerate(["O", *drawn[:-1]]):
            if drawn[at][0] == "I" and before[1:] != drawn[at][1:]:
                drawn[at] = f"B{drawn[at][1:]}"
        true.append(drawn)
        noise = rng.choice(tags, len(drawn))
        guess.append([str(n) if rng.random() < 0.3 else tag for tag, n in zip(true[-1], noise, strict=True)])
    records = [{"words": ["w"] * len(t), "tags": t} for t in true]
    handler, options, examples = made("token_classification", {"labels": SPANS}, records)
    predictions = [[{"start": s, "end": e, "entity_group": x} for s, e, x in tags_to_spans(one)] for one in guess]
    return handler, options, examples, predictions, true, guess


@pytest.mark.parametrize("seed", range(8))
def test_span_metrics_are_those_of_seqeval(seed: int) -> None:
    handler, options, examples, predictions, true, guess = spans(seed)
    theirs = span_report(true, guess, mode="strict", scheme=IOB2, output_dict=True, zero_division=0)
    found = handler.metrics(predictions, examples, options)
    assert list(found.values()) == pytest.approx(list(theirs["micro avg"].values())[:3])
    assert 0.1 < found["f1"] < 0.9
    for label, ours in handler.report(predictions, examples, options).items():
        assert list(ours.values()) == pytest.approx(list(theirs[label].values()))


def cases() -> dict[str, tuple[Any, Any, list[Any], list[Any]]]:
    rng = np.random.default_rng(1)
    choice = made("multiple_choice", {}, [{"question": "", "choices": ["x", "y"], "answer": i % 2} for i in range(30)])
    forth = made("generation", {}, [{"text": "", "target": f" {i % 3}"} for i in range(30)])
    pairs = [{"text": "", "text_pair": "", "score": float(s)} for s in rng.integers(3, size=30) / 2]
    return {
        "single": single(1),
        "spans": spans(1)[:4],
        "multiple_choice": (
            *choice,
            [[{"index": int(i), "choice": "", "score": 1.0}] for i in rng.integers(2, size=30)],
        ),
        "generation": (*forth, [[{"generated_text": str(i)}] for i in rng.integers(3, size=30)]),
        "similarity": (*made("similarity", {}, pairs), [{"score": float(s)} for s in rng.random(30).round(1)]),
    }


@pytest.mark.parametrize("name", ["single", "spans", "multiple_choice", "generation", "similarity"])
def test_a_weighting_is_the_resample_that_it_stands_for(name: str) -> None:
    handler, options, examples, predictions = cases()[name]
    rng = np.random.default_rng(2)
    weights = rng.multinomial(len(examples), [1 / len(examples)] * len(examples), size=7)
    weights[6] = np.eye(len(examples), dtype=int)[0] * 5  # one example alone: all is constant
    found = handler.weighted_metrics(predictions, examples, options)(weights.astype(np.float32))
    for at, row in enumerate(weights):
        chosen = np.repeat(np.arange(len(examples)), row)
        made_so = handler.metrics([predictions[i] for i in chosen], [examples[i] for i in chosen], options)
        assert {metric: values[at] for metric, values in found.items()} == pytest.approx(made_so, abs=1e-6)
    assert len(set(found[handler.metric].round(6))) > 3


def test_only_a_generation_can_be_a_copy() -> None:
    handler, options, examples = made("generation", {}, [{"text": "as it is", "target": "as it is"}])
    assert handler.metrics([handler.copied(examples[0], options)], examples, options) == {"exact_match": 1.0}
    for name in set(cases()) - {"generation"}:
        handler, options, examples, _ = cases()[name]
        assert handler.copied(examples[0], options) is None


def test_truths_that_an_audit_counts() -> None:
    def truths(kind: str, raw: dict[str, Any], record: dict[str, Any]) -> list[str]:
        handler, options, (example,) = made(kind, raw, [record])
        return list(handler.truths(example, options))

    assert truths("classification", {"labels": LABELS}, {"text": "", "label": "b"}) == ["b"]
    many = {"labels": LABELS, "multi_label": True}
    assert truths("classification", many, {"text": "", "label": ["b", "a"]}) == ["b", "a"]
    pair = {"text": "", "text_pair": ""}
    assert truths("similarity", {"high": 5}, {**pair, "score": 5}) == ["4 to 5"]
    assert truths("similarity", {"low": -1}, {**pair, "score": -0.5}) == ["-0.6 to -0.2"]
    assert truths("multiple_choice", {}, {"question": "", "choices": ["x", "y"], "answer": "B"}) == ["choice 1"]
    words = {"words": ["w"] * 3, "tags": ["B-PER", "I-PER", "B-PER"]}
    assert truths("token_classification", {"labels": SPANS}, words) == ["PER", "PER"]
    assert truths("generation", {}, {"text": "", "target": "x"}) == []
