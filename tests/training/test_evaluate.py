"""Evaluation through the engine: baselines, intervals, tables."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from mtserve.backends.eager import EagerBackend
from mtserve.engine import Engine, Task
from mtserve.errors import ConfigError
from mtserve.tasks import KINDS
from tests.tiny import PAD, tiny
from tests.training.conftest import rows
from tests.training.fake_data import task
from training.report.beside import Beside
from training.report.evaluate import Scores, evaluate, intervals, measure, signed, table

LABELS = {"labels": ["good", "bad", "fine"], "max_length": 48}


def scored(name: str, data: Any, family: str = "bert", **given: Any) -> Scores:
    return evaluate(tiny(family, only=(name,)).engine, name, data, **given)


def test_a_task_is_scored_as_a_caller_would_see_it() -> None:
    fine = [row for row in rows("classification", 12) if row["label"] == "fine"]  # the rarest label of evaluation
    data = task("classification", LABELS, train=fine, eval=rows("classification", 20, start=30))
    engine = tiny("bert", only=("topic",)).engine
    found = evaluate(engine, "topic", data, resamples=50)
    examples = data.splits["eval"].examples
    predictions = engine.predict("topic", [{"text": e.text} for e in examples])
    assert found.metrics == data.kind.metrics(predictions, examples, data.options)
    assert measure(engine, "topic", data) == found.metrics
    assert (found.metric, found.split, found.examples, found.resamples) == ("macro_f1", "eval", 20, 50)
    assert found.baseline == found.baselines["majority"]
    assert found.baseline["accuracy"] == sum(e.label == "fine" for e in examples) / 20 == 0.3
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


def test_copies_and_the_untrained_trunk_stand_beside_generations() -> None:
    options = {"template": "{source} [SEP]{target}", "max_new_tokens": 5, "max_length": 48}
    same = [{"text": "the town is red", "target": "the town is red"}, {"text": "the town", "target": "a river"}]
    data = task("generation", options, train=same, eval=same, test=same)
    untrained = [[{"generated_text": "a town"}], [{"generated_text": " a river"}]]
    beside = Beside(zero_shot={"eval": untrained})
    found = scored("forth", data, "gpt2", resamples=20, beside=beside)
    assert {which: of["exact_match"] for which, of in found.baselines.items()} == {
        "majority": 0,
        "copy": 0.5,
        "zero-shot": 0.5,
    }
    assert (found.metric, found.baselines["copy"]["copy_rate"], found.baselines["zero-shot"]["copy_rate"]) == (
        "bleu",
        1,
        0,
    )
    assert found.intervals.keys() == found.metrics.keys() == found.baselines["zero-shot"].keys()
    assert list(scored("forth", data, "gpt2", split="test", beside=beside).baselines) == ["majority", "copy"]
    assert found.report == {}
    assert found.confusion is None
    assert [line.split(" ")[0] for line in signed({"forth": found})] == ["bleu:", "bleu_lower:", "chrf:"]


def test_a_table_has_the_columns_that_are_filled() -> None:
    topic = Scores("accuracy", {"accuracy": 0.5, "mcc": -0.25}, {"majority": {"accuracy": 0.25, "mcc": 0.0}})
    baselines = {"majority": {"bleu": 0.0}, "copy": {"bleu": 0.125}, "zero-shot": {"bleu": 0.25, "style_accuracy": 1.0}}
    metrics = {"style_accuracy": 0.75, "bleu": 0.5}
    forth = Scores("bleu", metrics, baselines, intervals={"bleu": (0.4, 0.6)})
    assert table({"forth": forth, "topic": topic}, all_metrics=True) == [
        ("task", "metric", "value", "95% interval", "majority", "copy", "zero-shot"),
        ("forth", "bleu", "0.500", "0.400 to 0.600", "0.000", "0.125", "0.250"),
        ("forth", "style_accuracy", "0.750", "", "", "", "1.000"),
        ("topic", "accuracy", "0.500", "", "0.250", "", ""),
        ("topic", "mcc", "-0.250", "", "0.000", "", ""),
    ]
    assert table({"topic": topic}) == [("task", "metric", "value", "majority"), ("topic", "accuracy", "0.500", "0.250")]
    assert signed({"topic": topic}) == []


def test_masked_tokens_are_predicted_in_small_parts_beside_the_most_frequent_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits as wide as the vocabulary at each position: at most so many tokens' are in memory."""
    small, options = tiny("bert", only=("topic",)), {"max_length": 16, "mask_token": "[SEP]"}
    data = task("masked_lm", options, train=[{"text": "rain rain good"}], eval=[{"text": "the rain"}] * 7)
    small.model.add("mlm", data.kind.head(data.options))
    engine = Engine([Task("mlm", data.kind, data.options)], EagerBackend(small.model, pad_id=PAD), small.text)
    data.train.features = [data.kind.features(one, data.options, small.text) for one in data.train.examples]
    whole, predict, parts = evaluate(engine, "mlm", data), engine.predict, []
    monkeypatch.setattr("training.report.answers._MASKED_TOKENS_AT_ONCE", 3 * 16 + 1)
    monkeypatch.setattr(
        engine, "predict", lambda name, part, given: parts.append(len(part)) or predict(name, part, given)
    )
    assert evaluate(engine, "mlm", data) == whole
    assert parts == [3, 3, 1]
    (token,) = {one["token"] for one in predict("mlm", data.splits["eval"].examples[:1])[0]}
    count, vocabulary = {"the": 0, "rain": 2}[small.text.decode([token])], small.text.vocab_size
    assert whole.baseline["loss"] == pytest.approx(np.log((3 + vocabulary) / (count + 1)))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(200):
        right = rng.random(150) < 0.7
        low, high = intervals(lambda outcomes: {"share": outcomes[0].mean()}, (right,), resamples=400)["share"]
        covered += low <= 0.7 <= high
        widths.append(high - low)
    assert 0.89 <= covered / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 150), rel=0.1)


def test_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(1)
    sides = rng.random((2, 40))

    def r(x: Any, y: Any) -> float:
        return float(np.corrcoef(x, y)[0, 1])

    theirs = bootstrap(
        sides, r, paired=True, vectorized=False, n_resamples=100, method="percentile", rng=np.random.default_rng(0)
    )
    ours = intervals(lambda outcomes: {"r": r(*outcomes)}, tuple(sides), resamples=100)
    assert ours == {"r": pytest.approx(tuple(theirs.confidence_interval))}


def test_a_thousand_resamples_would_take_seconds() -> None:
    """1,500 examples of 8 labels: a hundred take about 0.5 s here; the bound is what makes intervals usable at all."""
    labels = [f"l{i}" for i in range(8)]
    kind = KINDS["classification"]
    examples = [kind.labelled.model_validate({"text": "", "label": labels[i % 8]}) for i in range(1500)]
    predictions = [[{"label": labels[i * i % 8], "score": 1.0}] for i in range(1500)]
    options = kind.options.model_validate({"labels": labels})
    started = time.process_time()
    outcomes = kind.outcomes(predictions, examples, options)
    found = intervals(partial(kind.score, options=options), outcomes, resamples=100)
    assert time.process_time() - started < 4
    assert all(low < high for low, high in found.values())
