"""One step over eight examples is one step, however it is cut into micro-batches: for every kind, loss and weights."""

from __future__ import annotations

import pytest
import torch

from mtserve.model import Model
from mtserve.tasks import KINDS
from mtserve.tasks.validation import validate
from mtserve.text import Text, text_spec
from tests.tiny import EOS, PAD, TOKENIZER_JSON, trunk_of
from tests.training.conftest import OPTIONS, Held, rows
from training.config import Training
from training.trainer.fit import TaskRun, Trained, fit
from training.trainer.learner import Learned

Outcome = tuple[Trained, dict[str, torch.Tensor]]


def _train(kinds: list[str], *, batch_size: int, accumulation: int, steps: int = 3) -> Outcome:
    trunk = trunk_of("gpt2" if "generation" in kinds else "bert")
    for module in trunk.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(1)
    model, runs = Model(trunk), {}
    text = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
    for name in kinds:
        kind = KINDS[name]
        raw = rows(name, 8)
        options = kind.options.model_validate(kind.fit(raw, OPTIONS[name]))
        features = [kind.features(validate(kind.labelled, row), options, text) for row in raw]
        assert len({tuple(map(len, rows)) for rows, _ in features}) == 1, "equal tokens, or means of means differ"
        model.add(name, kind.head(options))
        runs[name] = TaskRun(Learned(kind, options), Held(features), 0.5, batch_size)
    for module in model.heads.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = Training(
        epochs=steps,
        learning_rate=1e-3,
        gradient_accumulation=accumulation,
        scheduler="constant",
        optimizer="sgd",  # Adam hides a wrong scale of the gradient; plain descent shows it
        weight_decay=0.0,
        warmup_share=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
    )
    trained = fit(model, runs, settings=settings, seed=0, pad_id=PAD)
    return trained, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _equal(one: Outcome, other: Outcome) -> None:
    assert one[0].steps == other[0].steps
    for mine, theirs in zip(one[0].log, other[0].log, strict=True):
        for name in mine:
            if "loss" in name:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    for name, tensor in one[1].items():
        assert torch.allclose(tensor, other[1][name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_accumulation_changes_nothing(kind: str) -> None:
    whole = _train([kind], batch_size=8, accumulation=1)
    _equal(whole, _train([kind], batch_size=2, accumulation=4))
    before = _train([kind], batch_size=8, accumulation=1, steps=1)
    assert whole[0].log[0]["loss"] == pytest.approx(0.5 * whole[0].log[0][f"train_loss_{kind}"], rel=1e-5)
    assert any(not torch.equal(tensor, before[1][name]) for name, tensor in whole[1].items()), "weights must move"


def test_accumulation_over_several_tasks() -> None:
    kinds = ["classification", "token_classification"]
    _equal(_train(kinds, batch_size=8, accumulation=2), _train(kinds, batch_size=2, accumulation=8))


def test_a_short_last_window_is_divided_by_its_own_batches() -> None:
    """Three batches an epoch in windows of two: the last window has one batch, whose loss counts in full."""
    trained, _ = _train(["classification"], batch_size=3, accumulation=2, steps=1)
    weighted = [0.5 * entry["train_loss_classification"] for entry in trained.log]
    assert [entry["loss"] for entry in trained.log] == pytest.approx(weighted, rel=1e-5)
