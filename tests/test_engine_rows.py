"""What the engine makes of inputs before a pass, and of logits that are no numbers after it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mtserve.backends.base import Done
from mtserve.batching import Batch
from mtserve.engine import Engine
from mtserve.errors import InputError, NotFiniteError, UnknownTaskError
from mtserve.observer import Observer, Ran
from tests.tiny import tiny

TEXTS = ["good", "the parcel arrived two days late", "bad", "a book"]


class Counting:
    """A tokenizer that counts what it encodes."""

    def __init__(self, of: Any) -> None:
        self._of, self.encoded = of, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def encode(self, text: str, **how: Any) -> Any:
        self.encoded[text] += 1
        return self._of.encode(text, **how)

    def encode_batch(self, texts: list[str], **how: Any) -> Any:
        self.encoded.update(texts)
        return self._of.encode_batch(texts, **how)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_texts_of_several_tasks_are_encoded_once(texts: list[str]) -> None:
    small = tiny("bert")
    asked = dict.fromkeys(("topic", "tags", "names"))
    wanted = {name: small.engine.prepare_all(name, texts) for name in asked}
    text = small.text
    counting = text._tokenizer = Counting(text._tokenizer)  # type: ignore[assignment]
    works = Engine(small.tasks, small.engine.backend, text).prepare_tasks(asked, texts)
    assert counting.encoded == Counter(texts)
    for name, made in works.items():
        assert [[row.key for row in work.rows] for work in made] == [
            [row.key for row in work.rows] for work in wanted[name]
        ]
    assert all(one.rows[0] is other.rows[0] for one, other in zip(works["topic"], works["tags"], strict=True))


def test_problems_of_several_tasks_name_them() -> None:
    engine = tiny("bert").engine
    with pytest.raises(InputError) as raised:
        engine.prepare_tasks({"topic": {"top_k": 0}, "cosine": None}, ["good", 3])
    said = [(problem.index, problem.message.split(":")[0]) for problem in raised.value.problems]
    assert (1, "task 'topic'") in said
    assert (None, "task 'topic'") in said
    assert {index for index, task in said if task == "task 'cosine'"} == {0, 1}
    with pytest.raises(UnknownTaskError):
        engine.prepare_tasks({"topic": None, "nothing": None}, ["good"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_whose_output_is_no_number_fails_alone(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny("bert")
    engine = Engine(small.tasks, small.engine.backend, small.text)
    wanted = engine.predict("topic", TEXTS)
    launch = engine.backend.launch

    def broken(batch: Batch) -> Done:
        answers = launch(batch).result()
        shortest = min(range(len(batch.rows)), key=lambda at: len(batch.rows[at]))
        for task, indexes in batch.wanted.items():
            if shortest in indexes and task == "topic":
                answers[task][indexes.index(shortest)] = np.full(3, value, np.float32)
        return Done(answers)

    monkeypatch.setattr(engine.backend, "launch", broken)
    works = engine.prepare_all("topic", TEXTS)
    other = engine.prepare_all("tags", TEXTS)
    finished, unfinished = engine.step([*works, *other])
    assert (len(finished), unfinished) == (8, [])
    failed = [work for work in works if work.error is not None]
    assert len(failed) == 1
    with pytest.raises(NotFiniteError, match="task 'topic'"):
        engine.finish(failed[0])
    for work, prediction in zip(works, wanted, strict=True):
        if work is not failed[0]:
            assert [label["label"] for label in engine.finish(work)] == [label["label"] for label in prediction]
    assert all(engine.finish(work) is not None for work in other)


def test_batches_are_told_to_the_observer() -> None:
    class Told(Observer):
        def __init__(self) -> None:
            self.batches: list[Ran] = []
            self.prepared_tasks: list[tuple[str, ...]] = []
            self.cut: dict[str, int] = {}

        def ran(self, batch: Ran) -> None:
            self.batches.append(batch)

        def prepared(self, tasks: tuple[str, ...], *, seconds: float) -> None:
            assert seconds > 0
            self.prepared_tasks.append(tasks)

        def truncated(self, task: str, *, inputs: int) -> None:
            self.cut[task] = inputs

    small, told = tiny("bert"), Told()
    engine = Engine(small.tasks, small.engine.backend, small.text, max_batch_tokens=30, observer=told)
    works = engine.prepare_tasks({"topic": None, "tags": None}, [*TEXTS, TEXTS[0], "good " * 300])
    every = [work for made in works.values() for work in made]
    prompts = [row for work in every for row in work.rows]
    engine.step(every)
    assert told.prepared_tasks == [("topic", "tags")]
    assert told.cut == {"topic": 1, "tags": 1}
    assert sum(batch.rows for batch in told.batches) == 5
    assert sum(batch.joined for batch in told.batches) == len(every) - 5
    rows = {row.key: row for row in prompts}
    assert sum(batch.tokens for batch in told.batches) == sum(map(len, rows.values()))
    assert all(batch.padded == batch.tokens for batch in told.batches)  # the family is not padded
    assert all(batch.trunk_s > 0 and batch.head_s > 0 and set(batch.tasks) == set(works) for batch in told.batches)
    assert len(told.batches) > 1
