"""Rows of a batch that pass the trunk in groups of similar lengths: the same logits and gradients, fewer tokens."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import PAD, tiny
from training.trainer import learner
from training.trainer.learner import Learned, Learner, alike, collate

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "blend": ("similarity", {"low": 0, "high": 5, "method": "both", "max_length": 48}),
    "apart": ("multiple_choice", {"method": "cosine", "max_length": 48}),
    "joint": ("multiple_choice", {"max_length": 48}),
    "names": ("token_classification", {"labels": ["person"], "max_length": 48}),
}
LONG = "the parcel arrived two days late , but the support team was kind . " * 2
LABELLED: dict[str, list[dict[str, Any]]] = {
    "blend": [{"text": LONG, "text_pair": "good", "score": 3}, {"text": "red", "text_pair": "a tin", "score": 1}],
    "apart": [{"question": LONG, "choices": ["red", "a tin of soup", "one"], "answer": 1}] * 2,
    "joint": [
        {"question": LONG, "choices": ["red", LONG], "answer": 0},
        {"question": "red", "choices": ["a"], "answer": 0},
    ],
    "names": [{"text": LONG, "spans": []}, {"text": "red", "spans": []}],
}


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_every_row_is_in_one_group_and_no_group_could_better_be_two(lengths: list[int]) -> None:
    groups = alike(lengths)
    assert sorted(chain.from_iterable(groups)) == [*range(len(lengths))]
    sizes = [[lengths[at] for at in group] for group in groups]
    assert all(min(one) > max(other) for one, other in pairwise(sizes))
    for one in sizes:
        whole = len(one) * max(one)
        for cut in range(1, len(one)):
            parts = cut * max(one) + (len(one) - cut) * one[cut]
            assert whole - parts <= max(learner._FEWEST, learner._WORTH * whole)
    if len(groups) > 1:
        assert sum(len(one) * max(one) for one in sizes) < (1 - learner._WORTH) * len(lengths) * max(lengths)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("task", [*TASKS])
def test_groups_change_no_loss_and_no_gradient(family: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny(family, tasks=TASKS)
    of = small.engine.tasks[task]
    made = Learner(small.model, {task: Learned(of.kind, of.options)})
    examples = [of.kind.labelled.model_validate(record) for record in LABELLED[task]]
    batch = collate([of.kind.features(one, of.options, small.text) for one in examples], pad_id=PAD)
    passes, states = [], small.model.states
    monkeypatch.setattr(small.model, "states", lambda *t: [passes.append(tuple(t[0].shape)), states(*t)][1])
    found = []
    for fewest in (10**6, 4):
        monkeypatch.setattr(learner, "_FEWEST", fewest)
        passes.clear()
        small.model.zero_grad()
        loss = made(
            task, *(batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "rows", "targets"))
        )
        loss["loss"].backward()
        gradient = torch.cat([p.grad.flatten() for p in small.model.parameters() if p.grad is not None])
        found.append((float(loss["loss"].detach()), gradient, [*passes]))
    (one, plain, whole), (other, grouped, parts) = found
    assert len(whole) == 1
    assert (len(parts) > 1) == (task != "names")
    assert one == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(plain, grouped, atol=1e-4 * float(plain.abs().max()), rtol=1e-3)
