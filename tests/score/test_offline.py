"""`Engine.score`: any number of items, several tasks, in windows."""

from __future__ import annotations

from typing import Any

import pytest

from mtserve.errors import InputError, UnknownTaskError
from tests.labelled import rows
from tests.tiny import tiny

TEXTS = ("topic", "tags", "names", "forth")


def texts(count: int) -> list[str]:
    return [row["text"] for row in rows(tiny("bert", only=("topic",)), "topic", count)]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_it_answers_as_predict_does(family: str, window: int) -> None:
    engine = tiny(family).engine
    tasks = [task for task in TEXTS if task in engine.tasks]
    items = texts(7)
    found = list(engine.score(iter(items), tasks, window=window))
    assert [list(one) for one in found] == [tasks] * 7
    for task in tasks:
        for one, other in zip(found, engine.predict(task, items), strict=True):
            assert_near(one[task], other)


def assert_near(one: Any, other: Any) -> None:
    """Equal but for rounding: batches differ."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_near(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_near(left, right)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-5)
    else:
        assert one == other


def test_several_tasks_on_one_text_cost_one_pass() -> None:
    engine = tiny("bert", only=("topic", "tags", "names")).engine
    list(engine.score(texts(20), ["topic", "tags", "names"]))
    assert engine.counters.trunk_passes == 1
    assert engine.counters.rows <= 20


def test_parameters_of_a_task() -> None:
    engine = tiny("bert", only=("topic", "tags")).engine
    found = next(engine.score(["good"], {"topic": {"top_k": 1}, "tags": None}))
    assert (len(found["topic"]), len(found["tags"])) == (1, 2)


def test_a_bad_item_stops_it_or_stands_in_its_place() -> None:
    engine = tiny("bert", only=("topic", "names")).engine
    items: list[Any] = ["good", 3, {"words": ["great"]}, "bad"]
    with pytest.raises(InputError):
        list(engine.score(items, ["topic", "names"]))
    found = list(engine.score(items, ["topic", "names"], errors=True))
    failed = [{task for task, one in row.items() if isinstance(one, InputError)} for row in found]
    assert failed == [set(), {"topic", "names"}, {"topic"}, set()]
    assert found[3]["topic"] == engine.predict("topic", ["bad"])[0]


def test_wrong_tasks_and_parameters_are_errors_in_any_case() -> None:
    engine = tiny("bert", only=("topic",)).engine
    with pytest.raises(UnknownTaskError):
        list(engine.score(["good"], ["tpoic"], errors=True))
    with pytest.raises(InputError, match="top_k"):
        list(engine.score(["good"], {"topic": {"top_k": 0}}, errors=True))


def test_no_items_no_answers() -> None:
    assert list(tiny("bert", only=("topic",)).engine.score([], ["topic"])) == []
