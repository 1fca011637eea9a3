"""Rows that go on from pasts answer as whole rows do, whatever happened to the pasts; beginnings are encoded once."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from mtserve.backends.eager import EagerBackend
from mtserve.backends.staging import padded
from mtserve.batching import Batch
from mtserve.errors import CheckpointError
from mtserve.heads import StockHead
from mtserve.model import Model
from mtserve.rows import Floats, Past, Row, make_row
from mtserve.tasks import KINDS
from mtserve.tasks.base import HeadSpec
from mtserve.text import Text, text_spec
from tests.tiny import CLS, EOS, FAMILIES, PAD, TOKENIZER_JSON, VOCAB

SMALL = {**FAMILIES["llama"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": FAMILIES["gpt2"],
    "llama": SMALL,
    "qwen2": SMALL,
    "gpt_neox": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    "mistral": {**SMALL, "sliding_window": 12},
    "bert": FAMILIES["bert"],
    "openai-gpt": {key: FAMILIES["gpt2"][key] for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")},
}
GOES_ON = ["gpt2", "gpt_neox", "llama", "qwen2"]
HEADS = {
    "say": HeadSpec(architecture="causal_lm", reads="last"),
    "sort": HeadSpec(architecture="sequence_classification", labels=("a", "b", "c")),
    "tag": HeadSpec(architecture="token_classification", labels=("a", "b"), reads="all"),
}
MODELS: dict[str, Model] = {}


def model(family: str) -> Model:
    """A random model with a head of each sort that its family has; weights spread so that inputs change outputs."""
    if family not in MODELS:
        torch.manual_seed(0)
        trunk = AutoModel.from_config(AutoConfig.for_model(family, **CONFIGS[family])).eval()
        for name, parameter in trunk.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3 if "embed" not in name else 1.0)
        made = Model(trunk)
        for task, spec in HEADS.items():
            if (family, task) != ("openai-gpt", "tag"):
                made.add(task, spec)
        MODELS[family] = made.eval()
    return MODELS[family]


def backend(family: str) -> EagerBackend:
    return EagerBackend(model(family), pad_id=PAD)


def row(ids: Any, types: Any = None, **changes: Any) -> Row:
    size = len(ids)
    made = make_row(ids, [0] * size if types is None else types, [(0, 0)] * size, [False] * size)
    return replace(made, **changes)


def words(size: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(5, VOCAB, size)]


def answers(of: EagerBackend, rows: list[Row], task: str = "say") -> list[Floats]:
    return of.run(Batch(tuple(rows), {task: tuple(range(len(rows)))}))[task]


def assert_plain(found: list[Floats], of: EagerBackend, rows: list[Row], task: str = "say") -> None:
    """Equal to what each row answers as a whole and alone."""
    for array, one in zip(found, rows, strict=True):
        whole = answers(of, [replace(one, past=None, shared=0)], task)[0]
        assert array.shape == whole.shape
        np.testing.assert_allclose(array, whole, atol=1e-5, rtol=1e-5)


class Broken(RuntimeError):
    pass


@dataclass
class Program:
    """Sequences that join, go on, fork, are cut, leave, and passes that fail in the second layer."""

    of: EagerBackend
    plain: EagerBackend
    random: np.random.Generator
    running: list[Row] = field(default_factory=list)
    task: str = "say"
    dearer: bool = False  # a pass failed, or an origin was cut that a fork waits for: some tokens are computed anew

    def some(self) -> int | None:
        return int(self.random.integers(len(self.running))) if self.running else None

    def join(self) -> None:
        ids = self.random.integers(5, VOCAB, self.random.integers(1, 30))
        self.running.append(row(ids, self.random.integers(0, 2, len(ids)), past=Past()))

    def leave(self) -> None:
        if (at := self.some()) is not None:
            del self.running[at]

    def fork(self) -> None:
        if (at := self.some()) is not None and (past := self.running[at].past) is not None:
            self.running.append(replace(self.running[at], past=past.fork()))

    def cut(self) -> None:
        """Back to the first tokens, and on with others."""
        at = self.some()
        if at is not None and (past := self.running[at].past) is not None:
            size = int(self.random.integers(1, len(self.running[at]) + 1))
            past.cut(size)
            self.dearer |= any(r.past.origin is not None for r in self.running if r.past)
            old = self.running[at]
            self.running[at] = row(old.ids[:size], old.type_ids[:size], past=past)

    def go(self, *, fail: bool = False) -> None:
        """A pass with some of the sequences, each some tokens longer."""
        chosen = [at for at, r in enumerate(self.running) if len(r) < 90 and self.random.random() < 0.7]
        self.random.shuffle(chosen)
        for at in chosen:
            old = self.running[at]
            more = [int(i) for i in self.random.integers(5, VOCAB, self.random.integers(1, 4))]
            wanted = int(self.random.integers(1, len(more) + 1))
            self.running[at] = old.extended(more, past=old.past, answers=wanted)
        rows = [self.running[at] for at in chosen]
        if not rows:
            return
        lengths, pending = [r.past.length for r in rows if r.past], sum(r.pending for r in rows)
        before = self.of.tokens
        if fail:
            self.dearer = True
            with pytest.raises(Broken), BrokenLayer(self.of):
                answers(self.of, rows, self.task)
            assert [r.past.length for r in rows if r.past] == lengths
            return
        found = answers(self.of, rows, self.task)
        assert [r.past.length for r in rows if r.past] == [len(r) for r in rows]
        assert_plain(found, self.plain, rows, self.task)
        assert self.of.tokens - before >= pending
        if not self.dearer:
            assert self.of.tokens - before == pending


class BrokenLayer:
    """The trunk's second layer raises, after the first has written."""

    def __init__(self, of: EagerBackend) -> None:
        self.layer = next(m for m in of.served.trunk.modules() if isinstance(m, torch.nn.ModuleList))[1]

    def __enter__(self) -> None:
        def fail(*_: Any) -> None:
            raise Broken

        self.hook = self.layer.register_forward_pre_hook(fail)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


STEPS = ["join", "join", "go", "go", "go", "fork", "fork", "cut", "leave", "fail"]


@pytest.mark.parametrize("family", GOES_ON)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), steps=st.lists(st.sampled_from(STEPS), max_size=40))
def test_going_on_equals_whole_rows(family: str, seed: int, steps: list[str]) -> None:
    program = Program(backend(family), backend(family), np.random.default_rng(seed))
    assert program.of.keeps
    for step in ["join", "join", *steps, "go"]:
        if step == "fail":
            program.go(fail=True)
        else:
            getattr(program, step)()


def test_slots_are_freed_when_pasts_are_dropped() -> None:
    of = backend("llama")
    rows = [row(words(10, at), past=Past()) for at in range(6)]
    answers(of, rows)
    assert len(of.pasts.slots._slots) == 6
    del rows[:4]
    rows = [r.extended(words(1), past=r.past) for r in rows[::-1]]
    assert_plain(answers(of, rows), of, rows)
    assert len(of.pasts.slots._slots) == 2
    assert of.pasts.plan.slots == slice(0, 2)  # a pass over all that live copies nothing
    rows.clear()
    answers(of, [row(words(3))])
    assert of.pasts.shape == (0, 0)
    assert not of.pasts.layers


def test_forks_of_forks_are_copied_in_one_pass_and_let_their_origins_go() -> None:
    of = backend("gpt2")
    first = row(words(12), past=Past())
    answers(of, [first])
    pasts = [first.past]
    for _ in range(3):
        pasts.append(pasts[-1].fork())
    rows = [first.extended(words(1, at), past=past) for at, past in enumerate(pasts)]
    before = of.tokens
    found = answers(of, rows[1:])  # the origin goes on later: what the forks share is not overwritten
    assert of.tokens - before == 3
    assert all(past.origin is None for past in pasts)
    assert_plain(found, of, rows[1:])
    assert_plain(answers(of, rows[:1]), of, rows[:1])


def test_a_past_that_does_not_fit_its_row_changes_no_answer() -> None:
    one, other = backend("gpt2"), backend("gpt2")
    past = Past()
    answers(one, [row(words(9), past=past)])
    rows = [row(words(11, seed=1), past=past)]  # other tokens, though nobody cut the past
    assert_plain(answers(one, rows), one, rows)
    rows = [rows[0].extended(words(1), past=past)]
    assert_plain(answers(other, rows), one, rows)  # filled by another backend
    types = [row(rows[0].ids, [1] * 12, past=past)]  # the same tokens, of another type
    assert_plain(answers(one, types), one, types)


def test_a_fork_outlives_a_failed_pass_that_wrote_over_its_origin() -> None:
    of = backend("gpt2")
    first = row(words(10), past=Past())
    answers(of, [first])
    assert first.past is not None
    forked = first.extended(words(1), past=first.past.fork())
    first.past.cut(4)
    with pytest.raises(Broken), BrokenLayer(of):
        answers(of, [row([*words(4), *words(8, seed=1)], past=first.past)])
    assert_plain(answers(of, [forked]), of, [forked])


def test_what_grows_half_way_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    of = backend("llama")
    rows = [row(words(10), past=Past())]
    answers(of, rows)
    longer = [rows[0].extended(words(80), past=rows[0].past)]
    grow, done = type(of.pasts.layers[0]).resize, []

    def fails(layer: Any, *shape: int) -> None:
        if done:
            raise MemoryError
        done.append(grow(layer, *shape))

    monkeypatch.setattr(type(of.pasts.layers[0]), "resize", fails)
    with pytest.raises(MemoryError):
        answers(of, longer)
    assert longer[0].past is not None
    assert longer[0].past.length == 10
    monkeypatch.undo()
    assert_plain(answers(of, longer), of, longer)


def test_several_tasks_may_want_rows_that_go_on() -> None:
    of = backend("gpt2")
    rows = [row(words(8, at), past=Past()) for at in range(3)] + [row(words(5, 9))]
    for _ in range(3):
        wanted = {"say": (0, 2), "sort": (3, 1, 0), "tag": (2, 3)}
        found = of.run(Batch(tuple(rows), wanted))
        for task, some in wanted.items():
            assert_plain(found[task], of, [rows[at] for at in some], task)
        rows = [*(r.extended(words(2), past=r.past, answers=2) for r in rows[2::-1]), rows[3]]


def test_classification_is_the_same_beside_generation() -> None:
    of = backend("llama")
    texts = [row(words(size, size)) for size in (3, 17, 9)]
    alone = answers(of, texts, "sort")
    prompts = [row(words(size, size), past=Past()) for size in (5, 12)]
    batch = Batch((*prompts, *texts), {"sort": (2, 3, 4), "say": (0, 1)})
    for array, beside in zip(alone, of.run(batch)["sort"], strict=True):
        np.testing.assert_allclose(array, beside, atol=1e-6, rtol=1e-6)
    with torch.inference_mode():  # and without pasts, padded, as the model gives it
        whole = of.model("sort", *padded(texts, pad_id=PAD)).numpy()
    np.testing.assert_allclose(np.stack(alone), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("family", "warns"), [("bert", False), ("openai-gpt", True)])
def test_trunks_that_keep_nothing_compute_whole_rows(
    family: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    of = backend(family)
    with caplog.at_level(logging.WARNING, "mtserve.backends.eager"):
        assert not of.keeps
    ours = [record.getMessage() for record in caplog.records if record.name == "mtserve.backends.eager"]
    assert [family in message for message in ours] == [True] * warns
    rows = [row(words(6), past=Past())]
    for _ in range(2):
        before = of.tokens
        assert_plain(answers(of, rows, "sort"), backend(family), rows, "sort")
        assert of.tokens - before == len(rows[0])
        assert rows[0].past is not None
        assert rows[0].past.length == 0
        rows = [rows[0].extended(words(1), past=rows[0].past)]


def test_rows_longer_than_a_window_are_computed_whole() -> None:
    of = backend("mistral")
    rows = [row(words(9, at), past=Past()) for at in range(2)]
    computed = []
    for _ in range(6):
        before = of.tokens
        assert_plain(answers(of, rows), backend("mistral"), rows)
        computed.append(of.tokens - before)
        rows = [r.extended(words(1), past=r.past) for r in rows]
    assert computed == [18, 2, 2, 2, 26, 28]


def test_a_beginning_that_rows_share_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.backends.eager._WORTH_SHARING", 32)
    of = backend("gpt2")
    question = words(20)
    rows = [row([*question, *words(size, size)], shared=20) for size in (1, 4, 9)] + [row(words(7))]
    total = sum(map(len, rows))
    found = answers(of, rows, "sort")
    assert of.tokens == total - 2 * 20
    assert_plain(found, of, rows, "sort")
    before = of.tokens
    found_beside = of.run(
        Batch((*rows, row(words(11), past=Past())), {"sort": (2, 0), "say": (4,), "tag": (1, 3)}),
    )
    assert of.tokens - before == total + 11  # one of three needs all of its positions: what two save is not worth it
    assert_plain(found_beside["sort"], of, [rows[2], rows[0]], "sort")
    assert_plain(found_beside["tag"], of, [rows[1], rows[3]], "tag")
    answers(of, [row(words(2))])
    assert of.pasts.shape == (0, 0)


def test_beginnings_are_shared_beside_rows_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtserve.backends.eager._WORTH_SHARING", 32)
    of = backend("llama")
    running = [row(words(size, size), past=Past()) for size in (6, 14)]
    answers(of, running)
    running = [r.extended(words(1), past=r.past) for r in running]
    choices = [row([*words(25), *words(size, size)], shared=25) for size in (2, 3)]
    types = [replace(choice, type_ids=np.ones_like(choice.type_ids)) for choice in choices]  # another beginning
    rows = [choices[0], running[0], types[0], choices[1], running[1], types[1]]
    before = of.tokens
    found = of.run(Batch(tuple(rows), {"sort": (0, 2, 3, 5), "say": (4, 1)}))
    assert of.tokens - before == 2 + 2 * 25 + 2 * 5
    assert_plain(found["sort"], of, [choices[0], types[0], choices[1], types[1]], "sort")
    assert_plain(found["say"], of, [running[1], running[0]])


def test_choices_say_how_much_of_the_question_they_share() -> None:
    text = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
    kind = KINDS["multiple_choice"]
    options = kind.options(max_length=48)
    question = "what do you open when it starts to rain ?"

    def rows(*choices: str) -> list[Row]:
        return list(kind.rows(kind.example(question=question, choices=choices), options, text))

    asked = len(text.rows(question, limits=options.limits)[0])  # with the token before and the one between
    assert {r.shared for r in rows("an umbrella", "a book", "the rain")} == {asked}
    assert {r.shared for r in rows("a book", "a tin of soup")} == {asked + 1}
    short, long = rows("a", "a book")
    assert short.shared == long.shared == len(short) - 1
    assert {r.ids[0] for r in rows("a book")} == {CLS}


def test_type_zero_adds_nothing_and_others_the_embedding_of_their_id() -> None:
    for family in ("gpt2", "llama"):
        of = model(family)
        ids, mask, types = padded([row(words(7)), row(words(4, 1), [1, 1, 2, 1])], pad_id=PAD)
        with torch.inference_mode():
            found = of.states(ids, mask, types).hidden
            without = of.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            assert torch.equal(of.states(ids, mask, torch.zeros_like(types)).hidden, without)
            if family == "llama":
                assert torch.equal(found, without)
                continue
            stock = of.trunk(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        torch.testing.assert_close(found[0], without[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1, :4], stock[1, :4], atol=1e-5, rtol=1e-5)
        assert (found[1, :4] - without[1, :4]).abs().max() > 0.1


def test_a_head_must_read_what_is_asked() -> None:
    asked = {"architecture": "sequence_classification", "labels": ("a", "b")}
    assert StockHead(HeadSpec(**asked, reads="last"), model("llama").trunk.config).reads == "last"
    with pytest.raises(CheckpointError, match=r"bert .*reads 'pooled', not 'last'"):
        StockHead(HeadSpec(**asked, reads="last"), model("bert").trunk.config)


def test_buffers_are_as_large_as_what_lives() -> None:
    """Many short sequences, then one long one among few: not as many places as there were, each as long as the last."""
    of = backend("llama")
    rows = [row(words(6, seed), past=Past()) for seed in range(80)]
    answers(of, rows)
    assert of.pasts.shape == (80, 64)
    kept = rows[60:63]
    del rows
    long = row(words(90, 99), past=Past())
    found = answers(of, [*kept, long])
    assert of.pasts.shape == (8, 128)
    assert_plain(found, of, [*kept, long])
    later = [one.extended([7], past=one.past) for one in (*kept, long)]
    assert_plain(answers(of, later), of, later)


def test_a_row_beyond_reach_counts_whole() -> None:
    """Else a budget of pending tokens would let passes of whole rows through."""
    of = backend("mistral")
    long = row(words(11), past=Past())
    answers(of, [long])
    assert long.extended([7], past=long.past).pending == 1
    longer = long.extended([7, 8], past=long.past)
    answers(of, [longer])
    assert longer.past is not None
    assert longer.past.length == 0
    assert longer.pending == 13


def test_logits_of_a_row_are_its_own() -> None:
    """A view would keep the logits of the whole batch alive for as long as one work."""
    of = backend("llama")
    for array in answers(of, [row(words(5, seed), past=Past()) for seed in range(9)]):
        assert array.base is None


def test_beginnings_are_not_shared_where_that_would_take_much_room(monkeypatch: pytest.MonkeyPatch) -> None:
    of, question = backend("llama"), words(30)
    rows = [row([*question, 5 + at], shared=30) for at in range(5)]
    answers(of, rows)
    assert of.tokens == 30 + 5
    monkeypatch.setattr("mtserve.backends.eager._MOST_SHARED", 100)
    assert_plain(answers(of, rows), of, rows)
    assert of.tokens > 35 + 5 * 31
