"""Sums, means and keys of the ledger, against means worked out by hand or with exact fractions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtserve.errors import ConfigError
from training.trainer.ledger import RESERVED, Ledger, Sums, mean_of

BATCH = st.tuples(
    st.sampled_from([None, "a", "b.c"]),
    st.sampled_from([0.0, 0.25, 1 / 3, 1.0, 2.5]),
    st.floats(-1e3, 1e3),
    st.booleans(),
)
BATCHES = st.lists(BATCH, max_size=12)


def fill(ledger: Ledger, batches: list[Any]) -> None:
    for task, weight, value, twice in batches:
        with ledger.batch("train", task, weight):
            ledger.report(aux=value, **({"acc": torch.tensor([value, 1.0])} if twice else {}))
        ledger.add_part(value, window=3)
        if task:
            ledger.add_loss(task, value, weight=weight, examples=4 if weight else 0, tokens=torch.tensor(30))


def of_others(*others: Ledger) -> Any:
    """What gathering over processes gives: this ledger's sums, and those of the others."""
    return lambda mine: json.loads(json.dumps([mine, *(other.state_dict()["window"] for other in others)]))


def test_one_window_by_hand() -> None:
    ledger = Ledger()
    for task, weight, loss in (("a", 0.5, 2.0), ("a", 0.5, 4.0), ("b", 1.0, 7.0)):
        with ledger.batch("train", task, weight):
            ledger.report(acc=torch.tensor([True, False]), n=3)
        ledger.add_loss(
            task, torch.tensor(loss, requires_grad=True), weight=weight, examples=8, tokens=torch.tensor(100)
        )
        ledger.add_part(torch.tensor(loss * weight), window=round(1 / weight))
    assert ledger.row(tasks=["a", "b", "idle"]) == {
        **{"loss": 5.0, "train_loss_a": 3.0, "train_loss_b": 7.0},
        **{"train_acc_a": 0.5, "train_n_a": 3.0, "train_acc_b": 0.5, "train_n_b": 3.0},
        **{"train_share_a": 0.5, "train_examples_a": 16, "train_tokens_a": 200},
        **{"train_share_b": 0.5, "train_examples_b": 8, "train_tokens_b": 100},
        **{"train_share_idle": 0.0, "train_examples_idle": 0, "train_tokens_idle": 0},
    }
    assert ledger.totals == {"a": {"examples": 16, "tokens": 200}, "b": {"examples": 8, "tokens": 100}}
    empty = ledger.row()
    assert empty["train_share_a"] == empty["train_examples_b"] == 0, "a task that was seen once never disappears"
    assert "train_loss_a" not in empty


@given(BATCHES, BATCHES)
def test_means_are_over_all_processes(one: list[Any], other: list[Any]) -> None:
    """Of sums, not of the processes' means; against exact fractions."""
    here, there = Ledger(), Ledger()
    fill(here, one)
    fill(there, other)
    row = here.row(of_others(there))
    for task in ("a", "b.c"):
        found = [(Fraction(w), Fraction(v)) for t, w, v, _ in one + other if t == task and w]
        assert (f"train_loss_{task}" in row) == bool(found)
        if found:
            mean = float(sum(w * v for w, v in found) / sum(w for w, _ in found))
            assert row[f"train_loss_{task}"] == row[f"train_aux_{task}"] == pytest.approx(mean, rel=1e-12, abs=1e-9)
            assert row[f"train_examples_{task}"] == 4 * len(found)
    shares = [value for name, value in row.items() if name.startswith("train_share")]
    assert not shares or sum(shares) == pytest.approx(float(any(t and w for t, w, _, _ in one + other)))


@given(BATCHES, BATCHES, BATCHES)
def test_a_saved_ledger_goes_on_exactly(before: list[Any], window: list[Any], after: list[Any]) -> None:
    """Saved within a window and read back from JSON, it gives the rows of one that was never saved, bit by bit."""
    whole = Ledger()
    fill(whole, before)
    whole.row()
    fill(whole, window)
    resumed = Ledger()
    fill(resumed, after)  # what a trainer did before it is forgotten
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for ledger in (whole, resumed):
        fill(ledger, after)
    assert whole.row() == resumed.row()
    assert whole.summary() == resumed.summary()
    assert whole.totals == resumed.totals


@given(BATCHES.filter(bool), st.integers(1, 5))
def test_the_summary_is_over_the_whole_training(batches: list[Any], every: int) -> None:
    cut, once = Ledger(), Ledger()
    for start in range(0, len(batches), every):
        fill(cut, batches[start : start + every])
        cut.row()
    fill(once, batches)
    assert cut.summary() == pytest.approx(once.summary(), rel=1e-9, abs=1e-9)
    assert cut.summary()["train_loss"] == pytest.approx(
        3 * sum(b[2] for b in batches) / len(batches), rel=1e-9, abs=1e-9
    )


def test_processes_may_report_different_names() -> None:
    here, there = Ledger(), Ledger()
    with here.batch("train"), there.batch("train"):
        here.report(left=1)
        there.report(right=3)
    assert here.row(of_others(there)) == {"left": 1.0, "right": 3.0}


@pytest.mark.parametrize(
    ("value", "mean"),
    [
        (torch.tensor([[1, 2], [3, 6]]), 3.0),
        (torch.tensor([True, False, False, False]), 0.25),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor(2.5, requires_grad=True) * 2, 5.0),
        (np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float16), 2.5),
        (np.float32(0.5), 0.5),
        (np.array(7), 7.0),
        (3, 3.0),
        (True, 1.0),
        (0.1, 0.1),
        (torch.tensor([1.0, math.nan]), math.nan),
        (torch.tensor([]), math.nan),
        (np.array([]), math.nan),
        (math.inf, math.inf),
    ],
)
def test_values(value: Any, mean: float) -> None:
    ledger = Ledger()
    with ledger.batch("train"):
        ledger.report(x=value)
    assert ledger.row()["x"] == pytest.approx(mean, nan_ok=True)


def test_a_later_change_of_a_tensor_changes_nothing() -> None:
    tensor = torch.tensor(1.0, dtype=torch.float64)
    mean = mean_of("x", tensor)
    tensor += 1
    assert float(mean) == 1.0


def test_no_graph_is_kept() -> None:
    weight = torch.ones(3, requires_grad=True)
    mean = mean_of("x", weight * 2)
    assert mean.grad_fn is None
    assert not mean.requires_grad


@pytest.mark.parametrize("value", ["high", None, [1, 2], {"a": 1}, 1j, np.array(["a"]), torch.tensor(1j)])
def test_values_that_are_no_numbers_are_named(value: Any) -> None:
    ledger = Ledger()
    with (
        ledger.batch("train"),
        pytest.raises(ConfigError, match=r"^report_metrics cannot take accuracy=.*allowed: real"),
    ):
        ledger.report(accuracy=value)


@pytest.mark.parametrize("name", [*sorted(RESERVED), "eval_loss", "train_x", "test_x", "a b", "1st", ""])
def test_names_that_are_taken(name: str) -> None:
    ledger = Ledger()
    with ledger.batch("eval"), pytest.raises(ConfigError, match="report_metrics cannot take the name"):
        ledger.report(**{name: 1})


def test_the_name_self_is_free() -> None:
    ledger = Ledger()
    with ledger.batch("train"):
        ledger.report(self=2)
    assert ledger.row() == {"self": 2.0}


def test_keys_that_would_coincide() -> None:
    ledger = Ledger()
    for task in ("b", "a_b"):
        with ledger.batch("train", task):
            ledger.report(x_a=1, x=1)
    with pytest.raises(ConfigError, match="'train_x_a_b'; rename"):
        ledger.row()


def test_train_and_eval_are_apart_and_batches_nest() -> None:
    ledger = Ledger()
    ledger.report(x=0)
    with ledger.batch("train", weight=2.0):
        with ledger.batch("eval", "a", 5.0):
            ledger.report(x=1)
        ledger.report(x=3)
    ledger.report(x=0)
    assert ledger.evaluation("eval") == {"eval_a_x": 1.0}
    assert ledger.evaluation("eval") == {}
    assert ledger.row() == {"x": 3.0}


def test_keys_of_an_evaluation() -> None:
    ledger = Ledger()
    for prefix, keys in (("test", ["test_x", "test_a_x"]), ("eval_a", ["eval_a_x"]), ("a", ["a_x"])):
        for task in (None, "a") if prefix == "test" else ("a",):
            with ledger.batch("eval", task, 3.0):
                ledger.report(x=1)
        assert list(ledger.evaluation(prefix)) == keys


def test_a_batch_of_no_weight_only_counts() -> None:
    ledger = Ledger()
    with ledger.batch("train", "a", 0.0):
        ledger.report(x=math.nan)
    ledger.add_loss("a", math.nan, weight=0.0, examples=0, tokens=0)
    assert ledger.row(tasks=["a"]) == {"train_share_a": 0.0, "train_examples_a": 0, "train_tokens_a": 0}


def test_long_windows_are_summed_up_on_the_way() -> None:
    ledger = Ledger()
    for value in range(10_000):
        with ledger.batch("train"):
            ledger.report(x=value)
    assert len(ledger._late["train"]) < 5_000
    assert ledger.row() == {"x": 4999.5}


def test_state_is_json_of_plain_numbers() -> None:
    ledger = Ledger()
    with ledger.batch("train", None, 0.5):
        ledger.report(x=torch.tensor([1.0, 2.0]))
    state: dict[str, Sums] = json.loads(json.dumps(ledger.state_dict(), allow_nan=False))
    assert state == {"window": {"": {"x": [0.75, 0.5, 1]}}, "whole": {}}


def test_the_ledger_needs_no_tensor_library() -> None:
    code = "import sys, training.trainer.ledger; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
