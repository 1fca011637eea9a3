"""Trunk outputs that are kept: the book, and a backend that uses it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve.backends.eager import EagerBackend
from mtserve.backends.outputs import Outputs
from mtserve.engine import Engine
from tests.tiny import PAD, Tiny, tiny

TEXTS = [
    "ana silva moved from porto to oslo",
    "good",
    "the parcel arrived two days late , but the support team was kind",
]
PAIRS = [{"text": text, "text_pair": "a man is feeding his dog"} for text in TEXTS]


@given(st.integers(0, 12), st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 8), st.booleans()), max_size=40))
def test_the_book_keeps_what_was_used_last_within_its_bound(most: int, steps: list[tuple[str, int, bool]]) -> None:
    book, wanted = Outputs[int](most), OrderedDict[str, int]()
    for key, size, put in steps:
        if not put:
            assert book.get(key) == wanted.get(key)
            if key in wanted:
                wanted.move_to_end(key)
            continue
        book.put(key, size, size=size)
        if size <= most:
            wanted.pop(key, None)
            wanted[key] = size
            while sum(wanted.values()) > most:
                wanted.popitem(last=False)
        assert book.size == sum(wanted.values()) <= most
        assert len(book) == len(wanted)


def keeping(made: Tiny, most: int, **how: Any) -> Engine:
    return Engine(made.tasks, EagerBackend(made.model, pad_id=PAD, keep_bytes=most, **how), made.text)


def answers(engine: Engine, task: str) -> Any:
    return engine.predict(task, PAIRS if task in ("score", "cosine") else TEXTS)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "albert"])
@pytest.mark.parametrize("capture", [False, True])
def test_a_second_task_on_the_same_rows_runs_no_trunk_and_answers_the_same(family: str, capture: bool) -> None:
    """A head that reads the pooler after one that does not, and the other way round, among them."""
    made = tiny(family, only=("topic", "tags", "names", "score", "cosine"))
    plain, kept = made.engine, keeping(made, 10**7, capture=capture)
    computed, rows_of = None, {"names": 1, "topic": 1, "tags": 1, "score": 2, "cosine": 3}
    seen = set[int]()
    for task in ("names", "topic", "tags", "score", "cosine", "names", "topic", "cosine", "score"):
        found = answers(kept, task)
        for one, other in zip(_numbers(found), _numbers(answers(plain, task)), strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        assert (kept.counters.tokens == computed) == (rows_of[task] in seen), task
        seen.add(rows_of[task])
        computed = kept.counters.tokens
    passes = kept.counters.trunk_passes
    works = kept.prepare_all("topic", TEXTS)
    kept.complete(works)
    assert kept.counters.trunk_passes == passes
    assert not any(work.passes for work in works)


def _numbers(found: Any) -> list[float]:
    if isinstance(found, dict):
        return [number for value in found.values() for number in _numbers(value)]
    if isinstance(found, list):
        return [number for value in found for number in _numbers(value)]
    return [found] if isinstance(found, float) else []


def test_a_batch_of_some_that_are_kept_and_some_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny("bert", only=("topic", "names"))
    kept = keeping(made, 10**7)
    kept.predict("topic", TEXTS[:2])
    before = kept.counters.tokens
    works = kept.prepare_tasks({"topic": None, "names": None}, TEXTS)
    kept.complete([*works["topic"], *works["names"]])
    assert kept.counters.tokens - before == len(works["topic"][2].rows or works["topic"][2].prompt[0])
    for task in ("topic", "names"):
        for work, other in zip(works[task], made.engine.prepare_all(task, TEXTS), strict=True):
            made.engine.complete([other])
            np.testing.assert_allclose(work.logits[0], other.logits[0], atol=1e-5)


def test_nothing_of_private_rows_is_kept_or_used() -> None:
    made = tiny("bert", only=("topic", "names"))
    kept = keeping(made, 10**7)

    def run(task: str, private: bool) -> int:
        before = kept.counters.tokens
        works = kept.prepare_all(task, TEXTS)
        for work in works:
            work.private = private
        kept.complete(works)
        return kept.counters.tokens - before

    whole = run("topic", private=True)
    assert kept.backend.kept_bytes == 0
    assert run("names", private=False) == whole
    assert kept.backend.kept_bytes > 0
    assert run("topic", private=True) == whole
    assert run("topic", private=False) == 0


def test_memory_stays_within_its_bound() -> None:
    made = tiny("bert", only=("topic", "names"))
    row = 32 * 4 * (len(made.engine.prepare_all("topic", ["good"])[0].prompt[0]) + 1)  # states, and the pooler's output
    kept = keeping(made, 3 * row)
    for number in range(20):
        kept.predict("topic", [["good", "bad", "fine", "red", "blue"][number % 5]])
        assert 0 < kept.backend.kept_bytes <= 3 * row
    before = kept.counters.tokens
    kept.predict("names", ["red", "fine", "blue"])
    assert kept.counters.tokens == before
    kept.predict("names", ["good"])  # it was used longest ago
    assert kept.counters.tokens > before


def test_generation_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny("gpt2", only=("forth", "topic"))
    kept = keeping(made, 10**7)
    assert kept.predict("forth", ["good"]) == made.engine.predict("forth", ["good"])
    assert kept.backend.kept_bytes == 0


def test_after_a_pass_that_failed_nothing_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keeping(tiny("bert", only=("topic",)), 10**7)
    kept.predict("topic", TEXTS)
    backend = kept.backend
    assert isinstance(backend, EagerBackend)
    backend._forget()
    assert backend.kept_bytes == 0
