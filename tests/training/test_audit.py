"""The audit of data: what it counts, and what it warns of."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from tests.shared_data import DATA, needs_data
from tests.training.fake_data import task
from training.data.audit import audit

AB = {"labels": ["a", "b"]}


def texts(*pairs: str) -> list[dict[str, Any]]:
    """Records from "text:label"."""
    return [dict(zip(("text", "label"), pair.split(":"), strict=True)) for pair in pairs]


def test_repeats_conflicts_and_overlaps() -> None:
    data = task(
        "classification",
        AB,
        train=texts("One  town:a", "one town:b", "ONE\ttown :a", "river:b"),
        eval=texts("one Town:a", "red:b", "red:b"),
        test=texts("red:a", "green:b", "river:b"),
    )
    other = task("generation", {}, train=[{"text": "Red", "target": "x"}], eval=[{"text": "sea", "target": "river"}])
    found = audit({"topic": data, "forth": other})
    topic = found.tasks["topic"]
    assert {which: split.repeated for which, split in topic.splits.items()} == {"train": 2, "eval": 1, "test": 0}
    assert (topic.inputs, topic.conflicts) == (4, 2)  # one town: a and b; red: a and b
    assert {dataclasses.astuple(overlap) for overlap in found.overlaps} == {
        ("topic", "eval", "topic", "train", 1),
        ("topic", "eval", "forth", "train", 2),
        ("topic", "test", "topic", "train", 1),
        ("topic", "test", "topic", "eval", 1),
        ("topic", "test", "forth", "train", 1),
    }
    assert audit({"topic": data, "forth": other}) == found
    assert "topic eval: 2 of 3 inputs (66.7%) are also in forth train" in found.warnings()
    assert "topic: 2 of 4 inputs have more than one truth" in found.warnings()
    assert "topic train: 2 of 4 inputs occur earlier in the split" in found.warnings()
    assert found.table()[2] == ("topic", "eval", "3", "0", "1", "1", "1", "2", "2", "128", "0")
    assert json.loads(json.dumps(dataclasses.asdict(found)))["tasks"]["topic"]["conflicts"] == 2


def test_inputs_are_compared_field_by_field() -> None:
    pairs = [{"text": "a b", "text_pair": "c"}, {"text": "a", "text_pair": "b c"}, {"text": "a", "text_pair": "b c"}]
    data = task("similarity", {}, train=[{**pair, "score": 0.5} for pair in pairs], eval=[{**pairs[0], "score": 0.4}])
    found = audit({"score": data}).tasks["score"]
    assert (found.inputs, found.conflicts, found.splits["train"].repeated) == (2, 1, 1)
    words = {"words": ["An", "old", "town"], "tags": ["O", "O", "O"]}
    plain = {"text": "an old town", "spans": []}
    names = audit({"names": task("token_classification", {"labels": ["x"]}, train=[plain], eval=[words])})
    assert names.overlaps[0].examples == 1
    choices = [{"question": "q", "choices": [c, "z"], "answer": 0} for c in "xyx"]
    assert (
        audit({"c": task("multiple_choice", {}, train=choices, eval=choices)}).tasks["c"].splits["eval"].repeated == 1
    )


def test_label_drift_counts_beyond_what_chance_gives() -> None:
    rng = np.random.default_rng(0)

    def drawn(share: float, size: int) -> list[dict[str, Any]]:
        return texts(*(f"{number} {size}:{'ab'[rng.random() < share]}" for number in range(size)))

    same, other = drawn(0.3, 100), drawn(0.6, 99)
    data = task("classification", AB, train=drawn(0.3, 2000), eval=same, test=other)
    found = audit({"topic": data})
    splits = found.tasks["topic"].splits
    assert splits["train"].drift == 0
    shares = [sum(r["label"] == "a" for r in records) / len(records) for records in (same, other)]
    train = splits["train"].labels["a"] / 2000
    assert splits["eval"].drift == pytest.approx(abs(shares[0] - train))
    assert splits["test"].drift == pytest.approx(abs(shares[1] - train))
    drawn_chance = [abs(rng.binomial(2000, 0.3) / 2000 - rng.binomial(100, 0.3) / 100) for _ in range(2000)]
    assert splits["eval"].chance == pytest.approx(np.mean(drawn_chance), rel=0.1)
    (warning,) = [w for w in found.warnings() if "drift" in w]
    assert warning.startswith("topic test: labels drift from training's by 0.")


def test_absent_labels_are_named() -> None:
    data = task("classification", {"labels": ["a", "b", "c"]}, train=texts("x:a", "y:b"), eval=texts("z:a"))
    found = audit({"topic": data})
    assert [split.absent for split in found.tasks["topic"].splits.values()] == [("c",), ("b", "c")]
    assert "topic eval: no example of b, c" in found.warnings()


def test_lengths_and_what_the_limit_costs() -> None:
    data = task("classification", {**AB, "max_length": 9}, train=texts("x:a", "y:b"), eval=texts("z:a", "w:b"))
    data.train.lengths, data.train.cut = [9, 5], [6, 0]
    data.train.bad.messages.append("file:3: not JSON")
    found = audit({"topic": data})
    train = found.tasks["topic"].splits["train"]
    assert train.tokens == {"mean": 7, "median": 7, "p95": 8.8, "max": 9}
    assert (train.cut, train.lost, train.left_out) == (1, 0.3, 1)
    assert found.warnings() == [
        "topic train: 1 of 3 records are left out",
        "topic train: 1 of 2 inputs are cut to the limit, which loses 30.0% of the tokens",
    ]
    lines = found.lines()
    assert lines[0].split() == [
        *("task", "split", "examples", "left", "out", "repeated", "in", "train", "median", "p95", "max", "limit", "cut")
    ]
    assert lines[1].split() == ["topic", "train", "2", "1", "0", "7", "9", "9", "9", "1"]
    assert lines[-1].startswith("warning: topic train: ")


def test_clean_data_has_no_warnings() -> None:
    data = task("classification", AB, train=texts("x:a", "y:b"), eval=texts("z:a", "w:b"))
    assert audit({"topic": data}).warnings() == []


@needs_data
def test_held_out_lines_of_shakespeare_that_training_has() -> None:
    """Style classification of both sides: known to leak between its splits, which its own code does not report."""
    home = DATA / "shakespeare"

    def lines(split: str, style: str) -> list[str]:
        return (home / f"{split}.{style}.nltktok").read_text(encoding="utf-8").splitlines()

    splits = {
        which: [
            {"text": line, "label": style} for style in ("modern", "original") for line in lines(split, style) if line
        ]
        for which, split in (("train", "train"), ("eval", "valid"))
    }
    found = audit({"style": task("classification", {"labels": ["modern", "original"]}, **splits)})
    seen = {" ".join(r["text"].lower().split()) for r in splits["train"]}
    shared = sum(" ".join(r["text"].lower().split()) in seen for r in splits["eval"])
    assert [(o.split, o.other_split, o.examples) for o in found.overlaps] == [("eval", "train", shared)]
    assert shared > 50
    shown = f"style eval: {shared} of {len(splits['eval'])} inputs ({shared / len(splits['eval']):.1%})"
    assert f"{shown} are also in style train" in found.warnings()
