"""Metrics and reports of each kind against scikit-learn, scipy and seqeval on raw labels and tags."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import classification_report as span_report
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score, matthews_corrcoef

from mtserve.tasks import KINDS
from mtserve.tasks.spans import invalid_tags, tags_to_spans

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
    outcomes = handler.outcomes(predictions, examples, options)
    report = handler.report(outcomes, options)
    assert list(report) == LABELS
    for label, ours in report.items():
        assert list(ours.values()) == pytest.approx(list(theirs[label].values()))
    assert handler.confusion(outcomes, options) == confusion_matrix(true, guess, labels=LABELS).tolist()


def multiple(seed: int, size: int = 40, share: float = 0.5) -> tuple[Any, Any, list[Any], list[Any], Any, Any]:
    """A random multi-label task, with (size, labels) of 0 and 1 that are true and given."""
    rng = np.random.default_rng(seed)
    true, scores = (rng.random((size, 4)) < share).astype(int), rng.random((size, 4))
    sets = [[LABELS[i] for i in np.flatnonzero(row)] for row in true]
    raw = {"labels": LABELS[:4], "multi_label": True}
    handler, options, examples = made("classification", raw, [{"text": "", "label": one} for one in sets])
    predictions = [[{"label": name, "score": s} for name, s in zip(LABELS, row, strict=False)] for row in scores]
    return handler, options, examples, predictions, true, (scores >= 0.5).astype(int)


@pytest.mark.parametrize("seed", range(3))
def test_multi_label_metrics_are_those_of_scikit_learn(seed: int) -> None:
    handler, options, examples, predictions, true, guess = multiple(seed)
    assert handler.metrics(predictions, examples, options) == {
        "accuracy": pytest.approx(accuracy_score(true, guess)),
        "macro_f1": pytest.approx(f1_score(true, guess, average="macro")),
        "micro_f1": pytest.approx(f1_score(true, guess, average="micro")),
    }
    outcomes = handler.outcomes(predictions, examples, options)
    assert handler.confusion(outcomes, options) is None
    theirs = classification_report(true, guess, output_dict=True, zero_division=0)
    report = handler.report(outcomes, options)
    assert list(report) == LABELS[:4]
    for at, ours in enumerate(report.values()):
        assert list(ours.values()) == pytest.approx(list(theirs[str(at)].values()))


def test_a_multi_label_task_of_one_label_is_no_task_of_two() -> None:
    """Right are the second and the third; of the label alone one of two is found, and one of two is right."""
    records = [{"text": "", "label": ["a"] if true else []} for true in (1, 1, 0, 0)]
    handler, options, examples = made("classification", {"labels": ["a"], "multi_label": True}, records)
    predictions = [[{"label": "a", "score": score}] for score in (0.1, 0.9, 0.2, 0.8)]
    found = handler.metrics(predictions, examples, options)
    assert found == {"accuracy": 0.5, "macro_f1": 0.5, "micro_f1": 0.5}
    report = handler.report(handler.outcomes(predictions, examples, options), options)
    assert report == {"a": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}}


def test_no_label_at_all_is_rightly_given_and_nothing_to_divide_by() -> None:
    raw = {"labels": LABELS, "multi_label": True}
    handler, options, examples = made("classification", raw, [{"text": "", "label": []}] * 3)
    assert handler.metrics([[]] * 3, examples, options) == {"accuracy": 1.0, "macro_f1": 0.0, "micro_f1": 0.0}


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
    micro = theirs["micro avg"]
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx(list(micro.values())[:3])
    assert 0.1 < found["f1"] < 0.9
    valid = [["O" if at in set(invalid_tags(tags)) else tag for at, tag in enumerate(tags)] for tags in guess]
    while any(list(invalid_tags(tags)) for tags in valid):  # what an orphan was followed by is an orphan now
        valid = [["O" if at in set(invalid_tags(tags)) else tag for at, tag in enumerate(tags)] for tags in valid]
    flat = [pair for ours, theirs in zip(true, valid, strict=True) for pair in zip(ours, theirs, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in flat) / len(flat))
    report = handler.report(handler.outcomes(predictions, examples, options), options)
    assert list(report) == SPANS
    for label, ours in report.items():
        assert list(ours.values()) == pytest.approx(list(theirs[label].values()))


def cases() -> dict[str, tuple[Any, Any, list[Any], list[Any]]]:
    rng = np.random.default_rng(1)
    choice = made("multiple_choice", {}, [{"question": "", "choices": ["x", "y"], "answer": i % 2} for i in range(30)])
    lines = [" ".join(rng.choice(LABELS[:3], 6)) for _ in range(90)]
    pairs = zip(lines[:30], lines[30:60], strict=True)
    forth = made("generation", {}, [{"text": text, "target": target} for text, target in pairs])
    scored = [{"text": "", "text_pair": "", "score": float(s)} for s in rng.integers(3, size=30) / 2]
    return {
        "single": single(1),
        "multiple": multiple(1, share=0.2)[:4],
        "spans": spans(1)[:4],
        "multiple_choice": (
            *choice,
            [[{"index": int(i), "choice": "", "score": 1.0}] for i in rng.integers(2, size=30)],
        ),
        "generation": (*forth, [[{"generated_text": line}] for line in lines[60:]]),
        "similarity": (*made("similarity", {}, scored), [{"score": float(s)} for s in rng.random(30).round(1)]),
    }


@pytest.mark.parametrize("name", ["single", "multiple", "spans", "multiple_choice", "generation", "similarity"])
def test_selected_outcomes_score_as_the_examples_that_they_stand_for(name: str) -> None:
    handler, options, examples, predictions = cases()[name]
    outcomes = handler.outcomes(predictions, examples, options)
    rng, size = np.random.default_rng(2), len(examples)
    found = []
    for drawn in [*rng.integers(size, size=(6, size)), np.zeros(5, int), np.array([3])]:  # all constant, one alone
        found.append(handler.score(tuple(one[drawn] for one in outcomes), options))
        made_so = handler.metrics([predictions[i] for i in drawn], [examples[i] for i in drawn], options)
        assert found[-1] == made_so
        assert all(type(value) is float and -1 <= value <= 1 for value in made_so.values())
    assert len({one[handler.metric] for one in found}) > 3


def test_the_constant_stands_beside_each_prediction() -> None:
    handler, options, examples, predictions = cases()["single"]
    constants = handler.constants(predictions[:3], examples, [], options)
    assert constants == [handler.baseline(examples, options)] * 3


def test_only_a_generation_can_be_a_copy() -> None:
    handler, options, examples = made("generation", {}, [{"text": "all is as it is", "target": "all is as it is"}])
    found = handler.metrics([handler.copied(examples[0], options)], examples, options)
    wanted = {"bleu": 1, "bleu_lower": 1, "chrf": 1, "pinc": 0, "copy_rate": 1, "exact_match": 1}
    assert found == {name: pytest.approx(value) for name, value in wanted.items()}
    assert handler.metric == "bleu"
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
