"""Cosines between tasks' gradients: what they are, and that measuring changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtserve.errors import ConfigError
from tests.training.conftest import Run
from training.prepare import Prepared, prepare
from training.run import train
from training.runfile import read_config
from training.trainer import fit as module
from training.trainer.cosines import Cosines, GradientCosines, Sizes, mean_cosines, mean_sizes
from training.trainer.fit import Trained, arguments, fit, make_trainer

TWO = {"topic": "classification", "names": "token_classification"}


def fitted(path: Path, *overrides: str) -> tuple[Trained, dict[str, torch.Tensor]]:
    config = read_config(path, overrides)
    run = prepare(config, base=path.parent)
    found = fit(run.model, run.runs, settings=config.training, seed=0, pad_id=run.trunk.spec.pad_id)
    return found, {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def measured(path: Path, *overrides: str) -> tuple[tuple[Cosines, Sizes], Prepared, Any]:
    """Cosines and sizes before the first step."""
    config = read_config(path, overrides)
    run = prepare(config, base=path.parent)
    folder = path.parent / "trainer"
    args = arguments(config.training, seed=0, folder=folder)
    trainer = make_trainer(
        run.model, run.runs, args, settings=config.training, seed=0, pad_id=run.trunk.spec.pad_id, evaluator=dict
    )
    return GradientCosines(trainer, run.model.trunk, moments=1).measure(), run, trainer


def test_they_are_cosines_of_mean_gradients_over_all_examples(run_file: Run) -> None:
    (found, sizes), run, trainer = measured(run_file(TWO))
    assert set(found) == {("topic", "topic"), ("names", "names"), ("topic", "names")}
    run.model.eval()

    def gradient(task: str, indexes: list[int]) -> torch.Tensor:
        total = 0.0
        for index in indexes:  # one by one: a mean over examples, whatever their batches
            batch = trainer.collator.collate([run.runs[task].features.of([index])[0]])
            total = total + trainer.model(task, **batch)["loss"]
        run.model.zero_grad()
        total.backward()
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in run.model.trunk.parameters()
            ]
        )

    topic = gradient("topic", list(range(12)))
    even, odd = gradient("topic", list(range(0, 12, 2))), gradient("topic", list(range(1, 12, 2)))
    torch.testing.assert_close(topic, even + odd, rtol=1e-3, atol=1e-5)
    assert sizes["topic"] == pytest.approx(float(topic.norm()) / 12, rel=1e-3)
    expected = torch.nn.functional.cosine_similarity(even, odd, dim=0)
    assert found["topic", "topic"] == pytest.approx(float(expected), abs=1e-4)
    names = gradient("names", list(range(12)))
    assert abs(float(torch.nn.functional.cosine_similarity(topic, names, dim=0)) - found["topic", "names"]) < 0.1


def test_the_same_task_twice_pulls_the_same_way(run_file: Run) -> None:
    path = run_file({"topic": "classification", "again": "classification"})
    _, run, trainer = measured(path)
    with torch.no_grad():
        for name in ("topic", "again"):  # heads that say the same
            for ours, first in zip(
                run.model.head(name).parameters(), run.model.head("topic").parameters(), strict=True
            ):
                ours.copy_(first)
    cosines, sizes = GradientCosines(trainer, run.model.trunk, moments=1).measure()
    assert cosines["topic", "again"] == pytest.approx(1, abs=1e-5)
    assert sizes["topic"] == pytest.approx(sizes["again"], rel=1e-4)


def test_a_measured_training_ends_with_the_same_weights(run_file: Run) -> None:
    path = run_file(TWO)
    plain = fitted(path, "training.epochs=2")
    found = fitted(path, "training.epochs=2", "training.gradient_cosines=3")
    assert all(torch.equal(plain[1][name], found[1][name]) for name in plain[1])
    assert plain[0].cosines == []
    assert [row["step"] for row in found[0].cosines] == [2, 6, 10]
    mean = mean_cosines(found[0].cosines)
    values = [v for row in found[0].cosines for a, b, v in row["cosines"] if (a, b) == ("topic", "names")]
    assert len(values) == 3
    assert mean["topic", "names"] == pytest.approx(sum(values) / 3)
    sizes = [row["sizes"]["names"] for row in found[0].cosines]
    assert mean_sizes(found[0].cosines)["names"] == pytest.approx(sum(sizes) / 3)
    assert mean_sizes([{"step": 1, "cosines": []}]) == {}, "a checkpoint of before"
    assert plain[0].log == found[0].log


def test_a_resumed_run_keeps_what_was_measured_before(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file(TWO)
    wanted = ["training.epochs=2", "training.gradient_cosines=3", "training.save_steps=3"]
    whole = train(read_config(path, [*wanted, f"output={path.parent / 'whole'}"]), base=path.parent)
    assert whole is not None

    class Stop(Exception):
        pass

    class Stopping(GradientCosines):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            super().on_step_end(args, state, control)
            if state.global_step == 8:
                raise Stop

    monkeypatch.setattr(module, "GradientCosines", Stopping)
    with pytest.raises(Stop):
        train(read_config(path, wanted), base=path.parent)
    monkeypatch.setattr(module, "GradientCosines", GradientCosines)
    again = train(read_config(path, [*wanted, "resume=true"]), base=path.parent)
    assert again is not None
    assert again.trained.cosines == whole.trained.cosines
    text = (again.folder / "README.md").read_text()
    table = text.partition("Gradient cosine")[2]
    assert "| task | topic | names | size |" in table
    assert "| topic | " in table


def test_a_trunk_that_stays_has_no_gradients(run_file: Run) -> None:
    path = run_file(TWO)
    with pytest.raises(ConfigError, match=r"training\.gradient_cosines: with result: heads the trunk stays"):
        read_config(path, ["training.gradient_cosines=2", "result=heads"])
    with pytest.raises(ConfigError, match=r"training\.gradient_cosines: no weight of the trunk is trained"):
        fitted(path, "training.gradient_cosines=2", "training.freeze=trunk")
