"""Heads of pairs: what they see of two texts, on every path that leads to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtserve
from mtserve.backends.staging import padded
from mtserve.errors import ConfigError
from mtserve.heads import PairHead, TrunkStates
from mtserve.interop.split import split_head
from mtserve.rows import texts_of
from mtserve.tasks import KINDS
from tests.tiny import FAMILIES, PAD, Tiny, tiny, trunk_of, write_checkpoint
from training.trainer.learner import texts

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "follows": ("classification", {"labels": ["yes", "no"], "pooling": "pair", "max_length": 48}),
    "close": ("similarity", {"low": 0, "high": 5, "pooling": "pair", "max_length": 48}),
    "blend": ("similarity", {"low": 0, "high": 5, "method": "both", "max_length": 48}),
    "pick": ("multiple_choice", {"pooling": "pair", "max_length": 48}),
    "weigh": ("multiple_choice", {"method": "both", "max_length": 48}),
    "topic": ("classification", {"labels": ["good", "bad"], "max_length": 48}),
}
PAIRS = [
    {"text": "the parcel arrived two days late", "text_pair": "good"},
    {"text": "good", "text_pair": "what do you open when it starts to rain ?"},
    {"text": "a book"},
    {"text": "a book", "text_pair": ""},
]


@pytest.fixture(params=["bert", "roberta", "gpt2", "llama", "modernbert"])
def small(request: pytest.FixtureRequest) -> Tiny:
    return tiny(request.param, tasks=TASKS)


def by_hand(small: Tiny, task: str, row: Any) -> np.ndarray:
    """Logits of one row, from the trunk's states of that row alone, token by token."""
    with torch.inference_mode():
        hidden = small.model.states(*padded([row], pad_id=PAD)).hidden[0]
        if small.model.trunk.config.model_type in ("gpt2", "llama"):
            hidden = torch.stack([state / state.square().mean().sqrt() / 3 for state in hidden])
        own = [at for at, special in enumerate(row.special) if not special]
        x = [hidden[at] for at in own if at < (row.second or len(row))]
        y = [hidden[at] for at in own if at >= (row.second or len(row))]
        zero = torch.zeros(hidden.shape[1])
        u, v = (torch.stack(one).mean(0) if one else zero for one in (x, y))
        parts = [u, v, (u - v).abs(), u * v]
        for ours, theirs in ((y, x), (x, y)):
            if not ours or not theirs:
                parts += [zero, zero, torch.zeros(2)]
                continue
            pairs, likes = [], []
            for one in ours:
                every = torch.stack([torch.cosine_similarity(one, other, dim=0) for other in theirs])
                shares = (20 * every).softmax(0)
                pairs.append((one, shares @ torch.stack(theirs)))
                likes.append(float(shares @ every))
            cosines = torch.tensor(likes)
            parts += [
                torch.stack([one * other for one, other in pairs]).mean(0),
                torch.stack([(one - other).abs() for one, other in pairs]).mean(0),
                10 * torch.stack([cosines.mean(), cosines.min()]),
            ]
        found: np.ndarray = small.model.head(task).output(torch.cat(parts)).numpy()
    return found


def test_it_reads_both_texts_and_how_their_tokens_are_to_each_other(small: Tiny) -> None:
    works = small.engine.prepare_all("follows", PAIRS)
    rows = [work.rows[0] for work in works]
    for row, pair in zip(rows, PAIRS, strict=True):
        if pair.get("text_pair"):
            assert 0 < row.second < len(row)
            first = small.engine.prepare_all("follows", [{"text": pair["text"]}])[0].rows[0]
            own = [i for i, special in zip(first.ids, first.special, strict=True) if not special]
            texts = texts_of([row])[0]
            assert row.ids[texts == 1].tolist() == own, "the first text's tokens stand before it, and no other"
        else:
            assert row.second == 0
    small.engine.run(works)
    for work in works:
        np.testing.assert_allclose(work.logits[0], by_hand(small, "follows", work.prompt[0]), atol=5e-5)


def test_what_training_computes_is_what_is_served(small: Tiny) -> None:
    works = small.engine.prepare_all("close", PAIRS[:2])
    rows = [work.rows[0] for work in works]
    small.engine.run(works)
    with torch.inference_mode():
        trained = small.model("close", *padded(rows, pad_id=PAD), texts(rows))
    np.testing.assert_allclose(trained.numpy(), np.stack([np.stack(work.logits)[0] for work in works]), atol=5e-5)


def test_both_methods_are_averaged(small: Tiny) -> None:
    """Score and loss are the means of those of two heads with the same weights."""
    alone = tiny(
        small.model.trunk.config.model_type,
        tasks={
            "pair": TASKS["close"],
            "cosine": ("similarity", {"low": 0, "high": 5, "method": "cosine", "max_length": 48}),
        },
    )
    with torch.no_grad():
        for ours, theirs in zip(
            small.model.head("blend").parameters(), alone.model.head("pair").parameters(), strict=True
        ):
            theirs.copy_(ours)
    asked = [*PAIRS[:2], {"text": "a book", "text_pair": "a book"}]
    found = [one["score"] for one in small.engine.predict("blend", asked)]
    parts = [[one["score"] for one in alone.engine.predict(task, asked)] for task in ("pair", "cosine")]
    assert found == pytest.approx(np.mean(parts, 0), abs=1e-4)
    targets, losses = [0.2, 0.9, 1.0], []
    for tried, task in ((small, "blend"), (alone, "pair"), (alone, "cosine")):
        rows = [work.rows for work in tried.engine.prepare_all(task, asked)]
        flat = [row for each in rows for row in each]
        with torch.inference_mode():
            logits = tried.model(task, *padded(flat, pad_id=PAD), texts(flat))
        of = tried.engine.tasks[task]
        losses.append(float(of.kind.loss(logits, rows, targets, of.options)))
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-4)


def test_both_methods_of_choosing_are_averaged(small: Tiny) -> None:
    """Logits and loss are the means of those of two heads with the same weights; choices may be of any number."""
    options = {"joint": {"pooling": "pair"}, "apart": {"method": "cosine"}}
    tasks = {task: ("multiple_choice", {**of, "max_length": 48}) for task, of in options.items()}
    alone = tiny(small.model.trunk.config.model_type, tasks=tasks)
    with torch.no_grad():
        for ours, theirs in zip(
            small.model.head("weigh").parameters(), alone.model.head("joint").parameters(), strict=True
        ):
            theirs.copy_(ours)
    asked = [
        {"question": "what do you open when it starts to rain ?", "choices": ["an umbrella", "a tin of soup", "red"]},
        {"question": "good", "choices": ["a man", "good"]},
    ]
    found, wanted = small.engine.predict("weigh", asked), [alone.engine.predict(task, asked) for task in tasks]
    for both, joint, apart in zip(found, *wanted, strict=True):
        logs = [np.log([one["score"] for one in sorted(each, key=lambda o: o["index"])]) for each in (joint, apart)]
        shares = np.exp(np.mean(logs, 0))
        scores = [one["score"] for one in sorted(both, key=lambda o: o["index"])]
        np.testing.assert_allclose(scores, shares / shares.sum(), atol=1e-4)
    assert wanted[1][1][0]["choice"] == "good"
    losses = []
    for tried, task in ((small, "weigh"), (alone, "joint"), (alone, "apart")):
        rows = [work.rows for work in tried.engine.prepare_all(task, asked)]
        flat = [row for each in rows for row in each]
        with torch.inference_mode():
            logits = tried.model(task, *padded(flat, pad_id=PAD), texts(flat))
        of = tried.engine.tasks[task]
        losses.append(float(of.kind.loss(logits, rows, [2, 0], of.options)))
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-4)


def test_a_question_is_encoded_once_for_all_its_choices() -> None:
    tasks = {"apart": ("multiple_choice", {"method": "cosine"})}
    small = tiny("bert", tasks=tasks)
    small.engine.predict("apart", [{"question": "good", "choices": ["a man", "a book", "red", "a man"]}])
    assert small.engine.counters.rows == 4


def test_every_kind_that_has_it_answers_alone_as_in_a_batch_and_after_loading(small: Tiny, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "made", small)
    loaded = mtserve.load(tmp_path / "made")
    for task in small.tasks:
        sample = task.kind.sample(task.options)
        others = (
            PAIRS
            if task.name in ("follows", "topic")
            else [sample]
            if task.kind.name == "multiple_choice"
            else PAIRS[:2]
        )
        alone = small.engine.predict(task.name, [sample])[0]
        for engine in (small.engine, loaded):
            batch = engine.predict(task.name, [*others, sample])[-1]
            assert_equal(batch, alone)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=5e-5)
    else:
        assert one == other


def test_windows_have_their_own_beginnings() -> None:
    options = {"labels": ["yes", "no"], "pooling": "pair", "max_length": 12, "on_long": "window", "stride": 2}
    small = tiny("bert", tasks={"follows": ("classification", options)})
    works = small.engine.prepare_all(
        "follows", [{"text": "the parcel arrived two days late " * 3, "text_pair": "good"}]
    )
    rows = works[0].rows
    assert len(rows) > 2
    for row in rows:
        own = row.ids[row.second : len(row) - 1]
        assert own.tolist() == rows[0].ids[rows[0].second : -1].tolist()
    small.engine.run(works)
    for row, logits in zip(works[0].prompt, works[0].logits, strict=True):
        np.testing.assert_allclose(logits, by_hand(small, "follows", row), atol=5e-5)


def test_no_stock_model_has_it(tmp_path: Path) -> None:
    small = tiny("bert", tasks=TASKS)
    checkpoint = write_checkpoint(tmp_path / "made", small)
    with pytest.raises(ConfigError, match="task 'follows' has pooling pair, which no stock model of Transformers has"):
        split_head(checkpoint, "follows", tmp_path / "stock")


@pytest.mark.parametrize(
    ("kind", "method", "pooling"),
    [
        ("similarity", "cosine", "pair"),
        ("similarity", "both", "first"),
        ("similarity", "regression", "mean"),
        ("multiple_choice", "cosine", "pair"),
        ("multiple_choice", "both", "last"),
    ],
)
def test_poolings_that_a_method_does_not_have(kind: str, method: str, pooling: str) -> None:
    with pytest.raises(ValueError, match=f"pooling {pooling} is not possible for {method}"):
        KINDS[kind].options.model_validate({"method": method, "pooling": pooling})


def test_states_are_levelled_where_a_family_only_continues_texts() -> None:
    spec = KINDS["similarity"].head(KINDS["similarity"].options.model_validate({"pooling": "pair"}))
    made = {family: PairHead(spec, trunk_of(family).config) for family in FAMILIES}
    assert {family for family, head in made.items() if head.levels} == {"gpt2", "llama"}
    hidden, where = torch.randn(2, 6, 32), torch.tensor([[1, 1, 1, 2, 2, 0]] * 2)
    states = [TrunkStates(scale * hidden, None, (where > 0).long(), where) for scale in (1.0, 100.0)]
    for family, head in made.items():
        one, other = (head.eval()(each) for each in states)
        assert torch.allclose(one, other, atol=1e-5) is (family in ("gpt2", "llama")), "whatever the states' scale"
