"""Reporting, as users of the third write-up's trainer know it: its demo, the defects of that trainer one by one, tasks,
processes and resuming. In every row of a log, the loss is the sum of its reported parts."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from mtserve.errors import CheckpointError, ConfigError
from tests.training.writeups import s3_demo
from tests.training.writeups.s3_demo import Demo, parts, rows
from training.trainer.reporting import ReportingTrainer, ReportsMetrics

COMMAND = [
    *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4"),
    *("--logging_steps", "10", "--num_train_epochs", "10"),
]
QUIET = ["--use_cpu", "--dataloader_pin_memory", "False", "--disable_tqdm", "True", "--save_strategy", "no"]
PARTS = ("tensor", "np", "integer", "fp_num")
Row = dict[str, float]


def log_of(output: Path) -> list[Row]:
    found: list[Row] = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return found


def holds(row: Row, prefix: str = "") -> None:
    """The loss of a row is the sum of its reported parts, to 1e-6."""
    total = math.fsum(row[prefix + name] for name in PARTS)
    assert row[f"{prefix}loss"] == pytest.approx(total, rel=1e-6), row


def training_rows(log: list[Row]) -> list[Row]:
    return [row for row in log if "loss" in row]


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        **{"use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True, "save_strategy": "no"},
        **{"per_device_train_batch_size": 8, "logging_steps": 1, "num_train_epochs": 1, "report_to": "none"},
    }
    return TrainingArguments(str(folder), **{**settings, **given})


def train(folder: Path, model: nn.Module | None = None, count: int = 48, **given: Any) -> ReportingTrainer:
    trainer = ReportingTrainer(model or Demo(), arguments(folder, **given), train_dataset=rows(count))
    trainer.train()
    return trainer


# the demo and its command line


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's output folder, after its command line has run as users run it."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, s3_demo.__file__, "--output_dir", str(output), *COMMAND, *QUIET]
    command += ["--report_to", "tensorboard", "--eval_strategy", "epoch"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return output


def test_the_demo_logs_every_ten_steps_and_the_loss_is_the_sum_of_its_parts(demo: Path) -> None:
    """1000 rows are 125 micro-batches an epoch, so each has 32 steps, the last of one micro-batch alone."""
    log = log_of(demo)
    trained, evaluated = training_rows(log), [row for row in log if "eval_loss" in row]
    assert [row["step"] for row in trained] == list(range(10, 321, 10))
    assert len(evaluated) == 10
    assert len(log) == 32 + 10 + 1
    for row in trained:
        holds(row)
        assert {"epoch", "grad_norm", "learning_rate"} <= row.keys()
    for row in evaluated:
        holds(row, "eval_")
    holds(log[-1], "train_")
    assert log[-1]["train_loss"] == pytest.approx(np.mean([row["loss"] for row in trained]), rel=1e-6)


def test_the_demos_rows_are_means_of_the_data(demo: Path) -> None:
    """Evaluation weighs batches by their rows, its last being short, and its values are not those of training."""
    data = rows(100, seed=1)
    batches = [torch.stack([row["x"] for row in data[start : start + 8]]) for start in range(0, 100, 8)]
    for row in (row for row in log_of(demo) if "eval_loss" in row):
        for name in ("np", "integer", "fp_num"):
            mean = np.average([np.mean(parts(batch)[name]) for batch in batches], weights=list(map(len, batches)))
            assert row[f"eval_{name}"] == pytest.approx(mean, rel=1e-6)
    ends = [row["eval_tensor"] for row in log_of(demo) if "eval_loss" in row]
    assert ends == sorted(ends, reverse=True)


def test_tensorboard_shows_every_value(demo: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in demo.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    trained = training_rows(log_of(demo))
    for name in ("loss", *PARTS):
        shown = events.Scalars(f"train/{name}")
        assert [event.step for event in shown] == [row["step"] for row in trained]
        assert [event.value for event in shown] == pytest.approx([row[name] for row in trained], rel=1e-6)
        assert len(events.Scalars(f"eval/{name}")) == 10


@pytest.mark.parametrize(("accumulation", "logging", "count"), [(4, 3, 1000), (3, 7, 301), (5, 2, 77), (1, 1, 20)])
def test_the_sum_holds_wherever_windows_are_cut(accumulation: int, logging: int, count: int, tmp_path: Path) -> None:
    trainer = train(
        tmp_path, count=count, gradient_accumulation_steps=accumulation, logging_steps=logging, num_train_epochs=2
    )
    log = trainer.state.log_history
    steps = 2 * math.ceil(math.ceil(count / 8) / accumulation)
    assert [row["step"] for row in training_rows(log)] == list(range(logging, steps + 1, logging))
    for row in training_rows(log):
        holds(row)
    holds(log[-1], "train_")  # also over the steps after the last row


# two processes


def _two(output: Path, *more: str) -> list[Row]:
    """The demo's log, trained by two processes; where they hang, all of them are ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = ["--nproc_per_node", "2", "--master_port", port, s3_demo.__file__, "--output_dir", str(output), *QUIET]
    run = [sys.executable, "-m", "torch.distributed.run", *command, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True) as started:
        try:
            _, said = started.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            started.terminate()  # the launcher then ends the processes that it started
            raise
    assert started.returncode == 0, said
    return log_of(output)


@pytest.mark.slow
def test_b_values_of_all_processes_count(tmp_path: Path) -> None:
    """Over an epoch, the two halves of the data make the whole, and one process with twice the batch logs the same."""
    settings = ["--logging_steps", "25", "--num_train_epochs", "1", "--do_eval", "--learning_rate", "1e-3"]
    each = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3"]
    log = _two(tmp_path / "two", *each, *settings)
    for row in training_rows(log):
        holds(row)
    data = torch.stack([row["x"] for row in rows(1000)])
    for name, true in (
        ("np", parts(data)["np"].mean()),
        ("integer", int((data > 0).sum()) / 250),
        ("fp_num", data.square().mean()),
    ):
        assert log[-2][f"train_{name}"] == pytest.approx(float(true), rel=1e-6)
    alone = s3_demo.main(
        ["--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8", *QUIET, *settings]
    ).state.log_history
    for mine, theirs in zip(training_rows(alone), training_rows(log), strict=True):
        assert theirs["integer"] * 2 == pytest.approx(mine["integer"]), "half a batch has half as many positive floats"
        for name in ("np", "fp_num", "tensor"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4)
    holds(log[-1], "eval_")  # 100 rows in batches of 3 by 2 processes: two rows are there twice and count once


# defects of the write-up's trainer


def test_a_gathering_works_on_this_version_of_transformers(tmp_path: Path) -> None:
    assert all(PARTS[0] in row for row in training_rows(train(tmp_path).state.log_history))


class Head(nn.Module):
    supports_report_metrics = True

    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.name, self.value = name, value
        self.weight = nn.Parameter(torch.zeros(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.report_metrics(**{self.name: self.value})
        return x @ self.weight


class Twins(nn.Module):
    """A module that does not report itself over two heads of one class that do."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head("left", value), Head("right", value + 1)])

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": sum((nn.functional.mse_loss(head(x), labels) for head in self.heads), torch.zeros(()))}


def test_c_two_modules_of_one_class_and_two_trainers(tmp_path: Path) -> None:
    before = dict(vars(Head)), Head.__bases__
    trainers = [ReportingTrainer(Twins(value), arguments(tmp_path), train_dataset=rows(16)) for value in (1.0, 10.0)]
    for trainer in trainers:
        trainer.train()
    for trainer, value in zip(trainers, (1.0, 10.0), strict=True):
        for row in training_rows(trainer.state.log_history):
            assert (row["left"], row["right"]) == (value, value + 1)
    assert (dict(vars(Head)), Head.__bases__) == before, "classes stay as they are"


def test_c_two_trainers_of_one_model(tmp_path: Path) -> None:
    """Whoever runs the model gets its values, even where one evaluates in the middle of the other's training."""
    model = Demo()
    other = ReportingTrainer(model, arguments(tmp_path), eval_dataset=rows(16, seed=2))

    class Between(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            holds(other.evaluate(), "eval_")

    trainer = ReportingTrainer(model, arguments(tmp_path), train_dataset=rows(48), callbacks=[Between()])
    trainer.train()
    assert len(training_rows(trainer.state.log_history)) == 6
    for row in training_rows(trainer.state.log_history):
        holds(row)


def test_d_no_graph_outlives_its_step(tmp_path: Path) -> None:
    trainer = ReportingTrainer(Demo(), arguments(tmp_path, logging_steps=100), train_dataset=rows(32))
    held: list[Any] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            held[:] = [value for *_, value in trainer.ledger._late["train"] if isinstance(value, torch.Tensor)]

    trainer.add_callback(Look())
    trainer.train()
    assert len(held) == 8, "a tensor and a loss of each of four steps"
    assert not any(value.requires_grad or value.grad_fn for value in held)


def test_e_training_and_evaluation_are_apart(tmp_path: Path) -> None:
    """hf-multitask-trainer#12: evaluating in the middle of a window leaves the window as it is."""
    plain = train(tmp_path, logging_steps=4)
    settings = arguments(tmp_path, logging_steps=4, eval_strategy="steps", eval_steps=1)
    both = ReportingTrainer(Demo(), settings, train_dataset=rows(48), eval_dataset={"x": rows(20, seed=3)})
    both.train()
    assert training_rows(both.state.log_history) == training_rows(plain.state.log_history)
    evaluated = [row for row in both.state.log_history if "eval_x_loss" in row]
    assert len(evaluated) == 6
    for row in evaluated:
        holds(row, "eval_x_")
    assert {name: both.evaluate()[name] for name in ("eval_x_tensor", "eval_x_np")} == {
        name: evaluated[-1][name] for name in ("eval_x_tensor", "eval_x_np")
    }
    holds(both.predict(rows(9, seed=4)).metrics, "test_")


def test_f_entries_of_transformers_stay_and_none_is_hidden(tmp_path: Path) -> None:
    stock = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    trainer = train(tmp_path, include_num_input_tokens_seen="no")
    assert all(row.keys() == stock | set(PARTS) for row in training_rows(trainer.state.log_history))
    assert {"train_runtime", "train_samples_per_second", "total_flos"} <= trainer.state.log_history[-1].keys()

    class Loss(Twins):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.heads = nn.ModuleList([Head(name, 1.0)])

    with pytest.raises(ConfigError, match="cannot take the name 'epoch'"):
        train(tmp_path, Loss("epoch"))
    measured = ReportingTrainer(
        Loss("score"), arguments(tmp_path), eval_dataset=rows(8), compute_metrics=lambda _: {"score": 1.0}
    )
    with pytest.raises(ConfigError, match="eval_score: reported by the model and also a metric"):
        measured.evaluate()


def test_g_model_init(tmp_path: Path) -> None:
    trainer = ReportingTrainer(model_init=Demo, args=arguments(tmp_path), train_dataset=rows(24))
    trainer.train()
    assert len(training_rows(trainer.state.log_history)) == 3
    for row in training_rows(trainer.state.log_history):
        holds(row)


def test_g_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = ReportingTrainer(Demo(), eval_dataset=rows(8))
    trainer.args.dataloader_pin_memory = False
    holds(trainer.evaluate(), "eval_")


class Stop(Exception):
    """A run that is broken off."""


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Breaks off the first run that gets so far."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._count()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self._count()

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def test_g_training_again_begins_at_nothing(tmp_path: Path) -> None:
    """Broken off between rows, then run again: neither the window nor the sums of the first run count."""
    settings = arguments(tmp_path, logging_steps=4, max_steps=6)
    fresh = ReportingTrainer(model_init=Demo, args=settings, train_dataset=rows(48))
    again = ReportingTrainer(model_init=Demo, args=settings, train_dataset=rows(48), callbacks=[StopAt(5)])
    with pytest.raises(Stop):
        again.train()
    for trainer in (fresh, again):
        trainer.train()
    assert _entries(fresh) == _entries(again)


def test_g_evaluating_again_begins_at_nothing(tmp_path: Path) -> None:
    data = [{"x": torch.full((10,), float(number)), "labels": torch.zeros(())} for number in range(24)]
    trainer = ReportingTrainer(Demo(), arguments(tmp_path), eval_dataset=data, callbacks=[StopAt(2)])
    with pytest.raises(Stop):
        trainer.evaluate()
    holds(trainer.evaluate(), "eval_")


def test_g_evaluation_counts_batches_by_their_rows(tmp_path: Path) -> None:
    """Twelve rows in batches of eight: the means of the batches do not have the same weight."""
    data = rows(12)
    found = ReportingTrainer(Demo(), arguments(tmp_path), eval_dataset=data).evaluate()
    assert found["eval_fp_num"] == pytest.approx(float(torch.stack([r["x"] for r in data]).square().mean()), rel=1e-6)
    holds(found, "eval_")


# models


def test_a_model_without_a_trainer(tmp_path: Path) -> None:
    class Mixed(ReportsMetrics, Head):
        pass

    model = Mixed("x", 1.0)
    model(torch.ones(2, 10))
    trainer = ReportingTrainer(Demo(), arguments(tmp_path), train_dataset=rows(8))
    trainer.model.forward(**{name: torch.stack([row[name] for row in rows(4)]) for name in ("x", "labels")})
    trainer.train()
    holds(training_rows(trainer.state.log_history)[0])


def test_the_model_is_saved_and_copied_as_if_nobody_listened(tmp_path: Path) -> None:
    trainer = train(tmp_path, save_strategy="epoch", logging_steps=100)
    assert trainer.model.state_dict().keys() == Demo().state_dict().keys()
    same = copy.deepcopy(trainer.model)
    torch.save(trainer.model, tmp_path / "whole.pt")
    read = torch.load(tmp_path / "whole.pt", weights_only=False)
    inputs = {name: torch.stack([row[name] for row in rows(4)]) for name in ("x", "labels")}
    with trainer.ledger.batch("train"):
        same(**inputs)
        read(**inputs)
    assert trainer.ledger.row() == {}
    assert same.report_metrics.ledger is read.report_metrics.ledger is None, "copies report to nobody"
    train(tmp_path, same)


def test_checkpointed_activations_report_once(tmp_path: Path) -> None:
    calls = []

    class Again(Demo):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            def inner(x: torch.Tensor) -> torch.Tensor:
                calls.append(1)
                self.report_metrics(call=len(calls))
                return self.linear(x).squeeze(-1).square()

            return (torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).mean(),)

    log = training_rows(train(tmp_path, Again(), count=8).state.log_history)
    assert len(calls) == 2
    assert log[0]["call"] == 1.0


def test_losses_that_are_not_finite_stay_visible(tmp_path: Path) -> None:
    class Broken(Demo):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            self.report_metrics(tensor=math.nan)
            return (self.linear(x).sum() * math.nan,)

    log = training_rows(train(tmp_path, Broken(), logging_nan_inf_filter=True, max_grad_norm=0.0).state.log_history)
    assert all(math.isnan(row["loss"]) and math.isnan(row["tensor"]) for row in log)


class Kwargs(nn.Module):
    """As stock heads are: it takes **kwargs, and does not look into them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.linear(x).squeeze(-1), labels)}


class Scaled(Kwargs):
    """It does look into them, and says so."""

    accepts_loss_kwargs = True

    def forward(self, x: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        squares = (self.linear(x).squeeze(-1) - labels).square()
        items = kwargs.get("num_items_in_batch")
        return {"loss": squares.mean() if items is None else squares.sum() / items}


@pytest.mark.parametrize("model", [Kwargs, Scaled])
def test_accumulation_changes_neither_loss_nor_weights(model: type[Kwargs], tmp_path: Path) -> None:
    """huggingface/transformers#47688: plain descent, since Adam hides a wrong scale."""
    found = []
    for accumulation in (1, 2, 8):
        trainer = train(
            tmp_path,
            model(),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=16 // accumulation,
            max_grad_norm=0.0,  # clipping would hide it as well
            optim="sgd",
            learning_rate=1e-2,
        )
        losses = [row["loss"] for row in training_rows(trainer.state.log_history)]
        found.append((losses, trainer.model.linear.weight.detach().clone()))
    for losses, weight in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(weight, found[0][1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0][1], model().linear.weight, atol=1e-3), "weights must move"


# tasks


class Tasks(ReportingTrainer):
    """Two tasks in turn, as a trainer over several tasks uses the hooks; task `b` weighs 3, and `c` never comes."""

    weights: dict[str, float] = {"a": 1.0, "b": 3.0}  # noqa: RUF012

    def task_names(self) -> list[str]:
        return ["a", "b", "c"]

    def task_of(self, inputs: Any) -> str:
        return "ab"[int(inputs["labels"][0] > 0)]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        task = self.task_of(inputs)
        if model.training:
            weight = 1 / self.current_gradient_accumulation_steps
            self.ledger.add_loss(task, loss, weight=weight, examples=len(inputs["x"]), tokens=inputs["x"].numel())
            loss = loss * self.weights[task]
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_the_weighted_losses_of_the_tasks_add_up_to_the_loss(accumulation: int, tmp_path: Path) -> None:
    settings = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, logging_steps=2, num_train_epochs=2, eval_strategy="epoch"
    )
    trainer = Tasks(Demo(), settings, train_dataset=rows(84), eval_dataset=rows(84))
    trainer.train()
    *log, last = trainer.state.log_history
    assert len(training_rows(log)) >= 3
    for row, loss in [*((row, row["loss"]) for row in training_rows(log)), (last, last["train_loss"])]:
        summed = sum(trainer.weights[t] * row[f"train_share_{t}"] * row.get(f"train_loss_{t}", 0) for t in "ab")
        assert loss == pytest.approx(summed, rel=1e-6)
        assert sum(row[f"train_share_{t}"] for t in "abc") == pytest.approx(1)
        for task in "ab":
            if row[f"train_examples_{task}"]:
                parted = math.fsum(row[f"train_{name}_{task}"] for name in PARTS)
                assert row[f"train_loss_{task}"] == pytest.approx(parted, rel=1e-6)
        assert row["train_share_c"] == row["train_examples_c"] == row["train_tokens_c"] == 0
    assert last["train_examples_a"] + last["train_examples_b"] == 168
    assert trainer.ledger.totals["a"]["tokens"] + trainer.ledger.totals["b"]["tokens"] == 1680
    (*_, evaluated) = [row for row in log if "eval_loss" in row]
    assert {f"eval_{task}_{name}" for task in "ab" for name in PARTS} <= evaluated.keys()


# resuming


def _entries(trainer: ReportingTrainer) -> list[Row]:
    """The log without what a clock measures."""
    return [
        {n: v for n, v in row.items() if "_second" not in n and "runtime" not in n} for row in trainer.state.log_history
    ]


@pytest.mark.parametrize("kind", [ReportingTrainer, Tasks])
def test_a_resumed_run_logs_the_same_rows(kind: type[ReportingTrainer], tmp_path: Path) -> None:
    """Steps 5 and 10 lie within windows of three steps."""
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 3, "save_strategy": "steps", "save_steps": 5}
    whole = kind(Demo(), arguments(tmp_path, num_train_epochs=2, **settings), train_dataset=rows(100))
    whole.train()
    for step in (5, 10):
        resumed = kind(Demo(), arguments(tmp_path, num_train_epochs=2, **settings), train_dataset=rows(100))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert _entries(resumed) == _entries(whole)
        assert resumed.ledger.totals == whole.ledger.totals


def test_windows_of_more_processes_are_shared_out(tmp_path: Path) -> None:
    trainer = train(tmp_path, save_strategy="steps", save_steps=2, logging_steps=4, max_steps=4)
    here = tmp_path / "checkpoint-2" / "ledger-0.json"
    state = json.loads(here.read_text(encoding="utf-8"))
    halved = {name: [number / 2 for number in cell] for name, cell in state["window"][""].items()}
    for rank in (0, 1):
        here.with_name(f"ledger-{rank}.json").write_text(json.dumps({"window": {"": halved}, "whole": {}}))
    resumed = ReportingTrainer(
        Demo(), arguments(tmp_path, logging_steps=4, max_steps=4, save_strategy="no"), train_dataset=rows(48)
    )
    resumed.train(resume_from_checkpoint=str(here.parent))
    assert _entries(resumed) == _entries(trainer)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    again = ReportingTrainer(Demo(), arguments(tmp_path, max_steps=4), train_dataset=rows(48))
    path = tmp_path / "checkpoint-2" / "ledger-0.json"
    for text in ("{", "[]", '{"window": {}}', '{"window": {"": {"x": [1]}}, "whole": {}}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"ledger-0\.json is no state of a log"):
            again.train(resume_from_checkpoint=str(path.parent))
    path.unlink()
    again.train(resume_from_checkpoint=str(path.parent))
    holds(training_rows(again.state.log_history)[-1])


def test_it_takes_what_a_trainer_takes() -> None:
    """Overridden methods keep the names and the order of their parameters."""
    for name in ("training_step", "prediction_step", "log", "evaluation_loop", "_save_rng_state"):
        mine, stock = (list(inspect.signature(getattr(of, name)).parameters) for of in ReportingTrainer.__mro__[:2])
        assert mine == stock


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Trainers seed everything and set verbosity; later tests shall not notice."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
