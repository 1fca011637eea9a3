"""Evaluation through the engine: baselines, intervals, tables."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from mtserve.errors import ConfigError
from mtserve.tasks import KINDS
from mtserve.tasks.measures import once
from tests.tiny import tiny
from tests.training.conftest import rows
from tests.training.fake_data import task
from training.evaluate import Scores, evaluate, intervals, measure, table

LABELS = {"labels": ["good", "bad", "fine"], "max_length": 48}


def scored(name: str, data: Any, family: str = "bert", **given: Any) -> Scores:
    return evaluate(tiny(family, only=(name,)).engine, name, data, **given)


def test_a_task_is_scored_as_a_caller_would_see_it() -> None:
    data = task("classification", LABELS, train=rows("classification", 12), eval=rows("classification", 20, start=30))
    engine = tiny("bert", only=("topic",)).engine
    found = evaluate(engine, "topic", data, resamples=50)
    examples = data.splits["eval"].examples
    predictions = engine.predict("topic", [{"text": e.text} for e in examples])
    assert found.metrics == data.kind.metrics(predictions, examples, data.options)
    assert measure(engine, "topic", data) == found.metrics
    assert (found.metric, found.split, found.examples, found.resamples) == ("macro_f1", "eval", 20, 50)
    assert found.baseline == found.baselines["majority"]
    assert found.baseline["accuracy"] == sum(e.label == "good" for e in examples) / 20
    assert sum(map(sum, found.confusion or [])) == 20
    assert [scores["support"] for scores in found.report.values()] == [sum(row) for row in found.confusion or []]
    assert found.intervals.keys() == found.metrics.keys()
    assert all(low <= found.metrics[metric] <= high for metric, (low, high) in found.intervals.items())
    assert evaluate(engine, "topic", data, resamples=50) == found
    assert evaluate(engine, "topic", data).intervals == {}


def test_splits_are_asked_for_by_name() -> None:
    splits = {"train": rows("classification", 3), "eval": rows("classification", 3), "test": rows("classification", 6)}
    data = task("classification", LABELS, **splits)
    assert scored("topic", data, split="test").examples == 6
    del data.splits["test"]
    with pytest.raises(ConfigError, match=r"tasks\.topic has no split 'test'; it has train, eval"):
        scored("topic", data, split="test")


def test_the_copy_baseline_stands_beside_generations() -> None:
    options = {"template": "{text} [SEP]", "max_new_tokens": 5, "max_length": 48}
    same = [{"text": "the town", "target": "the town"}, {"text": "the town", "target": "a river"}]
    found = scored("forth", task("generation", options, train=same, eval=same), "gpt2", resamples=20)
    assert found.baselines == {"majority": {"exact_match": 0.0}, "copy": {"exact_match": 0.5}}
    assert found.report == {}
    assert found.confusion is None
    score = Scores("accuracy", {"accuracy": 0.5, "mcc": -0.25}, {"majority": {"accuracy": 0.25, "mcc": 0.0}})
    assert table({"forth": found, "topic": score}) == [
        ("task", "metric", "value", "95% interval", "majority", "copy"),
        ("forth", "exact_match", "0.000", "0.000 to 0.000", "0.000", "0.500"),
        ("topic", "accuracy", "0.500", "", "0.250", ""),
    ]
    assert table({"topic": score}, all_metrics=True) == [
        ("task", "metric", "value", "majority"),
        ("topic", "accuracy", "0.500", "0.250"),
        ("topic", "mcc", "-0.250", "0.000"),
    ]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    kind = KINDS["multiple_choice"]
    example = kind.labelled.model_validate({"question": "", "choices": ["x", "y"], "answer": 0})
    covered, widths = 0, []
    for _ in range(200):
        right = rng.random(150) < 0.7
        predictions = [[{"index": int(not one), "choice": "", "score": 1.0}] for one in right]
        weighted = kind.weighted_metrics(predictions, [example] * 150, kind.options())
        assert weighted is not None
        low, high = intervals(weighted, 150, 400)["accuracy"]
        covered += low <= 0.7 <= high
        widths.append(high - low)
    assert 0.89 <= covered / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 150), rel=0.1)


def test_intervals_do_not_depend_on_how_many_resamples_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, examples = KINDS["similarity"], rows("similarity", 30)
    labelled = [kind.labelled.model_validate(e) for e in examples]
    weighted = kind.weighted_metrics([{"score": i % 7} for i in range(30)], labelled, kind.options())
    assert weighted is not None
    whole = intervals(weighted, 30, 100)
    monkeypatch.setattr("training.evaluate._WEIGHTS_AT_ONCE", 100)
    assert intervals(weighted, 30, 100) == whole


def test_a_kind_without_weighted_metrics_is_resampled_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    data = task("classification", LABELS, train=rows("classification", 12), eval=rows("classification", 20))
    quick = scored("topic", data, resamples=100)
    kind = type(data.kind)
    weighted = kind.weighted_metrics
    monkeypatch.setattr(kind, "metrics", lambda self, *given: once(weighted(self, *given), len(given[1])))
    monkeypatch.setattr(kind, "weighted_metrics", lambda *_: None)
    slow = scored("topic", data, resamples=1000)
    assert (slow.resamples, slow.metrics) == (100, quick.metrics)
    assert {m: pytest.approx(limits, abs=1e-6) for m, limits in slow.intervals.items()} == quick.intervals


def test_a_thousand_resamples_take_no_time_to_speak_of() -> None:
    """1,500 examples of 8 labels: about 0.2 s here; the bound is what makes intervals usable at all."""
    labels = [f"l{i}" for i in range(8)]
    kind = KINDS["classification"]
    examples = [kind.labelled.model_validate({"text": "", "label": labels[i % 8]}) for i in range(1500)]
    predictions = [[{"label": labels[i * i % 8], "score": 1.0}] for i in range(1500)]
    started = time.perf_counter()
    weighted = kind.weighted_metrics(predictions, examples, kind.options.model_validate({"labels": labels}))
    assert weighted is not None
    found = intervals(weighted, 1500, 1000)
    assert time.perf_counter() - started < 10
    assert all(low < high for low, high in found.values())
