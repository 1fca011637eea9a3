"""A batch is launched before the answers of the one before are taken, and what goes wrong then harms nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtserve.backends.base import Answers, Pending
from mtserve.backends.eager import EagerBackend
from mtserve.backends.staging import Lane, moved, staged
from mtserve.batching import Batch
from mtserve.engine import Engine
from mtserve.rows import Past
from tests.test_pasts import answers, assert_plain, backend, row, words
from tests.tiny import GENERATION, PAD, Tiny, tiny

TEXTS = [" ".join(["parcel"] * n) for n in (14, 12, 10)]  # with a budget of 20 tokens, a batch each


class BrokenError(RuntimeError):
    pass


@dataclass
class Watched:
    """A backend that writes down when batches are launched and taken, and fails where it is told to."""

    of: Any
    fails: tuple[str, int] | None = None
    events: list[tuple[str, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def _note(self, event: str, number: int) -> None:
        self.events.append((event, number))
        if self.fails == (event, number):
            raise BrokenError(f"{event} {number}")

    def launch(self, batch: Batch) -> Pending:
        number = sum(event == "launch" for event, _ in self.events)
        self._note("launch", number)
        pending, note = self.of.launch(batch), self._note

        class Noted:
            times = pending.times

            def result(self) -> Answers:
                note("take", number)
                found: Answers = pending.result()
                return found

        return Noted()


def watched(small: Tiny, **how: Any) -> tuple[Engine, Watched]:
    watch = Watched(small.engine.backend, **how)
    return Engine(small.tasks, watch, small.text, max_batch_tokens=20), watch


def test_one_batch_is_ahead_and_none_is_left() -> None:
    small = tiny("bert", only=("topic",))
    engine, watch = watched(small)
    assert_near(engine.predict("topic", TEXTS), small.engine.predict("topic", TEXTS))
    order = [("launch", 0), ("launch", 1), ("take", 0), ("launch", 2), ("take", 1), ("take", 2)]
    assert watch.events == order
    works = engine.prepare_all("topic", TEXTS)
    before = engine.counters.trunk_passes
    engine.step(works)
    assert [work.passes for work in works] == [{before}, {before + 1}, {before + 2}]
    assert (engine.counters.rows, engine.counters.trunk_passes) == (6, 6)
    assert engine.counters.tokens == small.engine.backend.tokens


@pytest.mark.parametrize(
    ("fails", "after"),
    [
        (("launch", 0), [("launch", 0)]),
        (("launch", 1), [("launch", 0), ("launch", 1), ("take", 0)]),
        (("take", 0), [("launch", 0), ("launch", 1), ("take", 0), ("take", 1)]),
        (("take", 2), [("launch", 0), ("launch", 1), ("take", 0), ("launch", 2), ("take", 1), ("take", 2)]),
    ],
)
def test_a_step_that_raises_has_advanced_no_work_and_leaves_nothing_under_way(
    fails: tuple[str, int], after: list[tuple[str, int]]
) -> None:
    small = tiny("gpt2", tasks=GENERATION)
    wanted = small.engine.predict("forth", TEXTS)
    engine, watch = watched(small, fails=fails)
    works = engine.prepare_all("forth", TEXTS)
    rows = [work.rows for work in works]
    with pytest.raises(BrokenError, match="{} {}".format(*fails)):
        engine.step(works)
    assert watch.events == after
    assert [work.rows for work in works] == rows
    assert all(work.error is None for work in works)
    watch.fails = None
    assert engine.run(works) == wanted


def test_pasts_of_batches_under_way_are_kept_apart() -> None:
    small = tiny("llama", tasks=GENERATION)
    wanted = small.engine.predict("back", TEXTS, {"num_beams": 3})
    engine, watch = watched(small)
    assert engine.predict("back", TEXTS, {"num_beams": 3}) == wanted
    overtaken = [
        a for a, b in zip(watch.events, watch.events[1:], strict=False) if (a[0], b[0]) == ("launch", "launch")
    ]
    assert overtaken


def assert_near(found: Any, wanted: Any) -> None:
    """Equal predictions, but for the last digits of numbers."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_near(found[name], wanted[name])
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            assert_near(one, other)
    else:
        assert found == wanted


class Late(Lane):
    """A lane whose copies to the host are made no sooner than they are waited for; or fail then."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.fails, self.copies = fails, list[tuple[Tensor, Tensor]]()

    def fetched(self, tensor: Tensor) -> Tensor:
        host = torch.full_like(tensor, torch.nan)
        self.copies.append((host, tensor.clone()))
        return host

    def mark(self) -> Callable[[], None]:
        copies, self.copies = self.copies, []

        @torch.inference_mode()
        def wait() -> None:
            if self.fails:
                raise BrokenError
            for host, tensor in copies:
                host.copy_(tensor)

        return wait


def on(lane: Lane, of: EagerBackend) -> EagerBackend:
    of.__dict__["lane"] = lane
    return of


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
def test_nothing_is_read_before_it_is_there(family: str) -> None:
    small = tiny(family)
    late = Engine(small.tasks, on(Late(), EagerBackend(small.model, pad_id=PAD)), small.text, max_batch_tokens=20)
    for task in small.tasks:
        sample = task.kind.sample(task.options)
        for found, wanted in zip(*(of.predict(task.name, [sample] * 2) for of in (late, small.engine)), strict=True):
            assert_near(found, wanted)


def test_a_pass_that_fails_when_its_answers_are_taken_keeps_nothing() -> None:
    of, lane = backend("gpt2"), Late()
    rows = [row(words(8, at), past=Past()) for at in range(2)]
    answers(of, rows)
    rows = [one.extended(words(2), past=one.past) for one in rows]
    on(lane, of)
    lane.fails = True
    before = of.tokens
    pending = of.launch(Batch(tuple(rows), {"say": (0, 1)}))
    with pytest.raises(BrokenError):
        pending.result()
    assert [one.past.length for one in rows if one.past] == [8, 8]
    assert of.tokens == before
    lane.fails = False
    assert_plain(answers(of, rows), backend("gpt2"), rows)
    assert of.tokens == before + 20  # nothing of the failed pass is trusted
    assert [one.past.length for one in rows if one.past] == [10, 10]


def test_beginnings_that_a_batch_shared_are_let_go_when_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches under way would else take each other's room."""
    monkeypatch.setattr("mtserve.backends.eager._WORTH_SHARING", 32)
    of = on(Late(), backend("gpt2"))
    batches = [[row([*words(20, seed), *words(n, n)], shared=20) for n in (2, 3, 5)] for seed in (1, 2)]
    pending = []
    for rows in batches:
        pending.append(of.launch(Batch(tuple(rows), {"sort": (0, 1, 2)})))
        of.release()
        assert of.pasts.shape == (0, 0)
    for rows, one in zip(batches, pending, strict=True):
        assert_plain(one.result()["sort"], backend("gpt2"), rows, "sort")
    assert of.tokens == 2 * (20 + 2 + 3 + 5)


def test_rows_are_staged_line_by_line() -> None:
    first, second = np.array([5, 6], np.int32), np.array([7], np.int32)
    found = staged(([first, second], [second, first]), device=torch.device("cpu"))
    assert found.tolist() == [[5, 6, 7], [7, 5, 6]]
    assert found.dtype == torch.int64
    assert moved(first, torch.device("cpu")).tolist() == [5, 6]
