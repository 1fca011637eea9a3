"""Long texts through the engine: cut, refused, or read in windows, for every kind of one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtserve.errors import InputError
from mtserve.tasks.scores import softmax
from tests.tiny import Tiny, tiny

LONG = "the parcel arrived two days late , but the support team was kind . " * 6
ITEMS: dict[str, Any] = {
    "topic": LONG,
    "score": {"text": "a book", "text_pair": LONG},
    "cosine": {"text": LONG, "text_pair": "a man is feeding his dog"},
    "choice": {"question": LONG, "choices": ["one", "red green blue", "a tin of soup"]},
    "names": LONG,
}
KINDS_OF = {"topic": "classification", "score": "similarity", "cosine": "similarity"}
KINDS_OF |= {"choice": "multiple_choice", "names": "token_classification"}


def model(on_long: str) -> Tiny:
    raw: dict[str, Any] = {"max_length": 24, "stride": 4, "on_long": on_long}
    own = {"topic": {"labels": ["a", "b"]}, "cosine": {"method": "cosine"}, "names": {"labels": ["person"]}}
    return tiny("bert", tasks={name: (kind, {**raw, **own.get(name, {})}) for name, kind in KINDS_OF.items()})


@pytest.mark.parametrize("task", ITEMS)
def test_windows_read_the_whole_text(task: str) -> None:
    small = model("window")
    (work,) = small.engine.prepare_all(task, [ITEMS[task]])
    assert work.cut == 0
    assert max(row.window for row in work.rows) >= 3
    assert all(len(row) <= 24 for row in work.rows)
    (prediction,) = small.engine.run([work])
    changed = {**ITEMS[task]} if isinstance(ITEMS[task], dict) else {"text": ITEMS[task]}
    field = next(name for name, value in changed.items() if value == LONG)
    changed[field] = LONG.replace("kind", "awful") if task == "names" else LONG[: len(LONG) // 2] + "red " * 30
    (other,) = small.engine.predict(task, [changed])
    assert other != prediction  # what stands late in the text counts


@pytest.mark.parametrize("task", ITEMS)
def test_truncation_is_counted(task: str) -> None:
    (work,) = model("truncate").engine.prepare_all(task, [ITEMS[task]])
    assert work.cut > 0
    assert max(row.window for row in work.rows) == 0


@pytest.mark.parametrize("task", ITEMS)
def test_errors_name_the_input_and_both_lengths(task: str) -> None:
    short = {"choice": {"question": "good", "choices": ["one"]}, "names": "good", "topic": "good"}
    fine = short.get(task, {"text": "good", "text_pair": "bad"})
    with pytest.raises(InputError, match=r"input 1: the text has \d+ tokens; this task allows \d+ \(max_length 24\)"):
        model("error").engine.predict(task, [fine, ITEMS[task], fine])


def test_classification_averages_its_windows() -> None:
    small = model("window")
    (work,) = small.engine.prepare_all("topic", [LONG])
    (prediction,) = small.engine.run([work])
    shares = np.array([row.own_tokens for row in work.prompt], float)
    mean = np.average(np.stack(work.logits), axis=0, weights=shares)
    scores = {entry["label"]: entry["score"] for entry in prediction}
    np.testing.assert_allclose([scores["a"], scores["b"]], softmax(mean), atol=1e-6)
