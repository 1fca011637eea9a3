"""A plan says what the schedule then does, and what that costs."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.test_mixture import schedule, schedules
from training.trainer.mixture import Schedule
from training.trainer.plan import duration, measure, plan


@given(mixture=schedules(), accumulation=st.integers(1, 5), max_steps=st.none() | st.integers(1, 60))
def test_a_plan_counts_what_the_trainer_will_ask_for(
    mixture: Schedule, accumulation: int, max_steps: int | None
) -> None:
    """Counted here by going through the epochs as the Trainer does, step by step."""
    windows = [
        (number, epoch[start : start + accumulation])
        for number, epoch in enumerate(map(mixture.epoch, range(61)))
        for start in range(0, len(epoch), accumulation)
    ]
    steps = max_steps or math.ceil(mixture.epochs * math.ceil(len(mixture) / accumulation))
    asked, last = list(chain.from_iterable(window for _, window in windows[:steps])), windows[:steps][-1][0]
    ones = {task: [1] * size for task, size in mixture.sizes.items()}
    found = plan(mixture, rows=ones, tokens=ones, gradient_accumulation=accumulation, max_steps=max_steps)
    assert found.steps == steps
    assert found.epochs == len(asked) / len(mixture)
    assert found.first == [(task, len(indexes)) for task, indexes in mixture.epoch(0)[:12]]
    batches = Counter(task for task, _ in asked)
    for task, size in mixture.sizes.items():
        mine, examples = found.tasks[task], sum(len(indexes) for name, indexes in asked if name == task)
        assert (mine.batches, mine.examples, mine.passes) == (batches[task], examples, examples / size)
        assert mine.share == pytest.approx(batches[task] / len(asked))
        assert mine.rows == mine.tokens == examples
        assert mine.an_epoch == (mixture.counts(0)[task], mixture.counts(last)[task])


def test_rows_tokens_and_seconds_by_hand() -> None:
    mixture = schedule({"a": 4, "d": 2}, 2, "proportional", epochs=3)
    rows, tokens = {"a": [1, 1, 1, 3], "d": [2]}, {"a": [10, 20, 30, 40], "d": [8]}
    costs = {"a": 0.1, "d": 0.5}
    found = plan(mixture, rows=rows, tokens=tokens, seconds_per_token=costs, world_size=2)
    assert {t: (of.rows, of.tokens) for t, of in found.tasks.items()} == {"a": (18, 300), "d": (12, 48)}
    assert [found.tasks[task].seconds for task in "ad"] == pytest.approx([15, 12])
    assert found.seconds == pytest.approx(27)
    assert plan(mixture, rows=rows, tokens=tokens).seconds is None


def test_the_table() -> None:
    sizes = {"a": 12000, "b.c": 3000, "d": 96}
    mixture = schedule(sizes, {"a": 32, "b.c": 32, "d": 16}, "annealed", epochs=4)
    rows = {task: [4 if task == "d" else 1] for task in sizes}
    tokens = {"a": [20, 30], "b.c": [8], "d": [100]}
    found = plan(mixture, rows=rows, tokens=tokens, seconds_per_token=dict.fromkeys(sizes, 1e-3), first=4)
    first = ", ".join(f"{task} {len(indexes)}" for task, indexes in mixture.epoch(0)[:4])
    lines = found.format().splitlines()
    assert lines[0] == "mixture annealed: 4 epochs, 1,900 steps"
    assert lines[2].split() == [
        *["task", "batches/epoch", "examples/epoch", "rows/epoch", "tokens/epoch", "share", "passes", "time"],
    ]
    assert lines[3].split()[:4] == ["a", "375", "to", "216"]
    assert lines[6].split()[:2] == ["all", "475"]
    assert lines[-1] == f"first batches: {first}"
    assert len({len(line) for line in lines[2:7]}) == 1, "aligned at the right"
    a = found.tasks["a"]
    assert f"{a.examples / 4:,.0f}" in lines[3]
    assert f"{a.passes:.2f}" in lines[3]
    assert lines[3].endswith(duration(a.tokens * 1e-3))
    for steps, last in ((475, 0), (476, 1), (950, 1), (951, 2)):
        mine = plan(mixture, rows=rows, tokens=tokens, max_steps=steps).tasks["a"].an_epoch
        assert mine == (375, mixture.counts(last)["a"])


def test_a_table_without_times() -> None:
    mixture = schedule({"a": 4}, 2, "proportional")
    lines = plan(mixture, rows={"a": [1]}, tokens={"a": [5]}).format().splitlines()
    assert lines[3].split() == ["a", "2", "4", "4", "20", "100.0%", "3.00", "?"]


def test_a_token_costs_the_median_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 900, 1000, 1010, 2000, 2040, 3000, 3020])  # the first step takes 900 seconds
    monkeypatch.setattr("training.trainer.plan.perf_counter", lambda: next(ticks))
    asked: list[str] = []

    def step(task: str) -> int:
        asked.append(task)
        return 10

    assert measure(step, ["a"], repeats=3) == {"a": 2.0}
    assert asked == ["a"] * 4


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "?"), (1.26, "1.3 s"), (59.99, "60.0 s"), (90, "2 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said
