"""The Trainer over several tasks, on models small enough to work out by hand: rows of the log, evaluation, best
weights, names, and what a stock Trainer gets wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.utils import find_labels

from mtserve.errors import ConfigError
from tests.training.conftest import Run
from training import run as runs
from training.finish import Result
from training.run import train
from training.runfile import read_config
from training.stock.collation import FeatureCollator
from training.trainer.fit import check_best
from training.trainer.mixture import MixtureConfig
from training.trainer.multitask import MultitaskTrainer
from training.trainer.reporting import ReportsMetrics

Row = dict[str, float]
WEIGHTS = {"topic": 2.0, "a.b": 0.5, "c-d_e": 1.0}
SIZES = {"topic": 23, "a.b": 9, "c-d_e": 14}
BATCHES = {"topic": 4, "a.b": 2, "c-d_e": 5}


def items(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Features of 1 to 6 tokens; the label follows from the ids."""
    made = []
    for number in range(count):
        ids = [1 + (number * 7 + at * 3 + seed) % 11 for at in range(1 + number % 6)]
        made.append({"input_ids": ids, "labels": ids[0] % 2})
    return made


class Toy(nn.Module):
    """A mean of embeddings under a head for each task; it takes **kwargs, as many wrappers do."""

    def __init__(self, tasks: Mapping[str, Any] = SIZES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.drop = nn.Embedding(12, 4, padding_idx=0), nn.Dropout(0.1)
        self.heads = nn.ModuleDict({task.replace(".", "!"): nn.Linear(4, 2) for task in tasks})

    def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
        mask = batch["attention_mask"][..., None]
        pooled = (self.embed(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
        logits = self.heads[batch["task_name"].replace(".", "!")](self.drop(pooled))
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]), "logits": logits}


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    fixed: dict[str, Any] = {"report_to": "none", "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(
        str(folder), **{**fixed, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.05, **given}
    )


def trainer_of(folder: Path, model: nn.Module | None = None, **given: Any) -> MultitaskTrainer:
    """`given`: of the trainer where it has such a parameter, else of the arguments."""
    own = ("eval_dataset", "compute_metrics", "evaluator", "mixture", "batch_sizes", "weights", "callbacks")
    of_trainer = {name: given.pop(name) for name in (*own, "train_dataset", "data_collator") if name in given}
    data = of_trainer.pop("train_dataset", {task: items(size) for task, size in SIZES.items()})
    return MultitaskTrainer(model or Toy(), arguments(folder, **given), train_dataset=data, **of_trainer)


def rows_of(trainer: MultitaskTrainer) -> list[Row]:
    return [row for row in trainer.state.log_history if "loss" in row]


# rows of the log


def expected(trainer: MultitaskTrainer, first: int, last: int) -> tuple[dict[str, int], dict[str, int]]:
    """Examples and tokens of each task in the steps from `first` up to `last`, out of the schedule alone."""
    window, schedule = trainer.args.gradient_accumulation_steps, trainer.sampler.schedule
    each = math.ceil(len(schedule) / window)
    examples, tokens = dict.fromkeys(SIZES, 0), dict.fromkeys(SIZES, 0)
    for step in range(first, last):
        epoch, at = divmod(step, each)
        for task, indexes in schedule.epoch(epoch)[at * window : (at + 1) * window]:
            examples[task] += len(indexes)
            tokens[task] += sum(len(items(SIZES[task])[index]["input_ids"]) for index in indexes)
    return examples, tokens


@pytest.mark.parametrize("strategy", ["proportional", "round_robin", "uniform", "annealed"])
@pytest.mark.parametrize(("accumulation", "logging"), [(1, 4), (4, 3), (3, 2)])
def test_the_loss_of_a_row_is_the_sum_of_its_parts(
    strategy: str, accumulation: int, logging: int, tmp_path: Path
) -> None:
    """14 batches an epoch, of them four short ones: windows of 4 and of 3 end ragged."""
    trainer = trainer_of(
        tmp_path, weights=WEIGHTS, batch_sizes=BATCHES, mixture=MixtureConfig(strategy=strategy),
        gradient_accumulation_steps=accumulation, logging_steps=logging, num_train_epochs=3,
    )  # fmt: skip
    trainer.train()
    *_, last = trainer.state.log_history
    steps = 3 * math.ceil(14 / accumulation)
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == list(range(logging, steps + 1, logging))
    covered = [(row, row["loss"], row["step"] - logging, row["step"]) for row in rows]
    for row, loss, first, end in [*covered, (last, last["train_loss"], 0, steps)]:
        present = [task for task in SIZES if f"train_loss_{task}" in row]
        parts = [WEIGHTS[t] * row[f"train_share_{t}"] * row[f"train_loss_{t}"] for t in present]
        assert loss == pytest.approx(math.fsum(parts), abs=1e-6)
        assert math.fsum(row[f"train_share_{task}"] for task in SIZES) == pytest.approx(1)
        examples, tokens = expected(trainer, int(first), int(end))
        assert {task: row[f"train_examples_{task}"] for task in SIZES} == examples
        assert {task: row[f"train_tokens_{task}"] for task in SIZES} == tokens
        assert present == [task for task in SIZES if examples[task]]
    assert trainer.ledger.totals == {
        t: {"examples": last[f"train_examples_{t}"], "tokens": last[f"train_tokens_{t}"]} for t in SIZES
    }
    if strategy in ("proportional", "round_robin"):
        assert {task: total["examples"] for task, total in trainer.ledger.totals.items()} == {
            task: 3 * size for task, size in SIZES.items()
        }


def test_tensorboard_has_every_tasks_scalars_and_stays_after_the_run(run_file: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = run_file({"topic": "classification", "names": "token_classification"})
    result = run(path, "training.report_to=[tensorboard]", "training.eval_steps=2", "training.best=average")
    (folder,) = {file.parent for file in (path.parent / "out.training").rglob("events.out.tfevents.*")}
    assert {child.name for child in (path.parent / "out.training").iterdir()} == {"runs"}
    events = EventAccumulator(str(folder)).Reload()
    rows = [row for row in result.trained.log if "loss" in row]
    assert len(rows) == 3
    for name in [key for key in rows[0] if key.startswith("train_")] + ["loss"]:
        of_rows = [(row["step"], row[name]) for row in rows if name in row]
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert len(shown) == len(of_rows) + (name != "loss"), "the last one is of the whole training"
        assert shown[: len(of_rows)] == [(step, pytest.approx(value, rel=1e-6)) for step, value in of_rows]
    evaluated = [row for row in result.trained.log if "eval_average" in row]
    for name in ("average", "topic_macro_f1", "names_f1"):
        assert [event.value for event in events.Scalars(f"eval/{name}")] == pytest.approx(
            [row[f"eval_{name}"] for row in evaluated], rel=1e-6
        )


# evaluation


def right(prediction: Any) -> dict[str, float]:
    return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Heard(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.metrics: list[Row] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Row, **_: Any) -> None:
        self.metrics.append(dict(metrics))


def test_evaluation_measures_every_task_and_is_told_once(tmp_path: Path) -> None:
    heard = Heard()
    data = {task: items(size, seed=5) for task, size in SIZES.items()}
    trainer = trainer_of(
        tmp_path, eval_dataset=data, compute_metrics={"topic": right, "c-d_e": right}, callbacks=[heard],
        eval_strategy="steps", eval_steps=3, max_steps=6, per_device_eval_batch_size=4,
    )  # fmt: skip
    assert find_labels(Toy) == [], "a stock Trainer would measure nothing"
    trainer.train()
    assert [set(metrics) for metrics in heard.metrics] == [
        {"epoch", "eval_average", "eval_topic_right", "eval_c-d_e_right", *(f"eval_{task}_loss" for task in SIZES)}
    ] * 2
    found = trainer.evaluate()
    assert len(heard.metrics) == 3
    logged = [row for row in trainer.state.log_history if "eval_average" in row]
    assert [{n: v for n, v in row.items() if n != "step"} for row in logged] == heard.metrics
    model = trainer.model.eval()
    for task, features in data.items():
        batch = FeatureCollator(pad_id=0)(features)
        with torch.no_grad():
            output = model(task_name=task, **batch)
        assert found[f"eval_{task}_loss"] == pytest.approx(float(output["loss"]), rel=1e-5)
        if task != "a.b":
            share = (output["logits"].argmax(-1) == batch["labels"]).float().mean()
            assert found[f"eval_{task}_right"] == pytest.approx(float(share))
    first = found["eval_topic_right"], found["eval_a.b_loss"], found["eval_c-d_e_right"]
    assert found["eval_average"] == pytest.approx(sum(first) / 3)
    alone = trainer.evaluate({"topic": data["topic"][:5]}, metric_key_prefix="test")
    assert set(alone) == {"epoch", "test_average", "test_topic_right", "test_topic_loss"}
    assert alone["test_average"] == alone["test_topic_right"]


def test_names_are_those_of_tasks(tmp_path: Path) -> None:
    data = {task: items(4) for task in SIZES}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"eval_dataset": {"b": items(2)}}, "'b' is no task of train_dataset; allowed: topic, a.b, c-d_e"),
        ({"batch_sizes": {"b": 2}}, "'b' is no task of train_dataset"),
        ({"weights": {"b": 2.0}}, "'b' is no task of train_dataset"),
        ({"compute_metrics": {"b": right}}, "'b' is no task of train_dataset"),
        ({"data_collator": {task: FeatureCollator(pad_id=0) for task in [*SIZES, "b"]}}, "'b' is no task of train"),
        ({"data_collator": {"topic": FeatureCollator(pad_id=0)}}, "'a.b' is no task of data_collator; allowed: topic"),
        ({"mixture": MixtureConfig(strategy="weights", weights={"topic": 1.0})}, "mixture.weights lacks a.b, c-d_e"),
    ]
    for given, message in wrong:
        with pytest.raises(ConfigError, match=message):
            trainer_of(tmp_path, **given)
    trainer = trainer_of(tmp_path, eval_dataset=data)
    with pytest.raises(ConfigError, match="'b' is no task of train_dataset"):
        trainer.evaluate({"b": items(2)})
    with pytest.raises(ConfigError, match="evaluation needs eval_dataset: a mapping"):
        trainer.evaluate(items(2))
    with pytest.raises(ConfigError, match="evaluation needs eval_dataset: a mapping"):
        trainer_of(tmp_path).evaluate()
    bare = [{"input_ids": item["input_ids"]} for item in items(2)]
    with pytest.raises(ConfigError, match=r"eval_dataset: task 'a\.b' has items without labels"):
        trainer.evaluate({"a.b": bare})
    twice = {"a": {"b_c": 1.0}, "a_b": {"c": 1.0}}
    named = trainer_of(tmp_path, evaluator=lambda: twice, train_dataset={"a": items(2), "a_b": items(2)})
    with pytest.raises(ConfigError, match="two metrics would be called eval_a_b_c; rename one of the tasks"):
        named.evaluate()


def test_collators_of_the_tasks(tmp_path: Path) -> None:
    """A batch is what the task's own collator makes of it, with or without a mask."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, task_name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight - x).square().mean()}

    collators: dict[str, Callable[[list[float]], dict[str, torch.Tensor]]] = {
        "a": lambda found: {"x": torch.tensor(found)},
        "b": lambda found: {"x": -torch.tensor(found)},
    }
    data = {"a": [1.0] * 4, "b": [2.0] * 4}
    trainer = trainer_of(
        tmp_path, Plain(), train_dataset=data, data_collator=collators, num_train_epochs=1, learning_rate=0.0
    )
    trainer.train()
    *_, last = trainer.state.log_history
    assert (last["train_loss_a"], last["train_loss_b"], last["train_examples_b"]) == (1.0, 4.0, 4)


# best weights, and stopping early


class Script:
    """An evaluator that says what it is told, and keeps the weights that it was asked about."""

    def __init__(self, values: list[dict[str, dict[str, float]]]) -> None:
        self.values, self.weights, self.model = values, list[dict[str, torch.Tensor]](), Toy()

    def __call__(self) -> dict[str, dict[str, float]]:
        self.weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return self.values[len(self.weights) - 1]


@pytest.mark.parametrize(
    ("metric", "greater", "values", "best"),
    [
        ("average", True, [{"topic": {"f1": v}, "a.b": {"r": w}} for v, w in [(0.1, 0.2), (0.6, 0.5), (0.9, 0.1)]], 1),
        ("eval_a.b_r", True, [{"topic": {"f1": 0.9}, "a.b": {"r": v}} for v in (0.5, 0.4, 0.3)], 0),
        ("eval_c-d_e_loss", False, [{"c-d_e": {"x": v, "loss": v}} for v in (3.0, 1.0, 2.0)], 1),
        ("eval_topic_f1", True, [{"topic": {"f1": v}} for v in (math.nan, 0.2, 0.1)], 1),
    ],
)
def test_the_best_weights_come_back(
    metric: str, greater: bool, values: list[dict[str, dict[str, float]]], best: int, tmp_path: Path
) -> None:
    script = Script(values)
    trainer = trainer_of(
        tmp_path, script.model, evaluator=script, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, save_total_limit=1, max_steps=6, load_best_model_at_end=True, metric_for_best_model=metric,
        greater_is_better=greater,
    )  # fmt: skip
    trainer.train()
    assert len(script.weights) == 3
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, script.weights[best][name]), name
    assert trainer.state.best_global_step == 2 * (best + 1)
    assert any(not torch.equal(tensor, script.weights[best - 1][n]) for n, tensor in trainer.model.state_dict().items())


def test_stopping_early_looks_at_any_metric(tmp_path: Path) -> None:
    for metric, stops in (("average", 4), ("eval_a.b_r", 3)):
        values = [{"topic": {"f1": v}, "a.b": {"r": 0.5}} for v in (0.1, 0.2, 0.2, 0.1, 0.0, 0.0)]
        trainer = trainer_of(
            tmp_path / metric, evaluator=Script(values), callbacks=[EarlyStoppingCallback(2)], eval_strategy="steps",
            eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, max_steps=6,
            metric_for_best_model=metric, greater_is_better=True,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == stops


def run(path: Path, *overrides: str) -> Result:
    result = train(read_config(path, [*overrides, "resamples=0"]), base=path.parent)
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("best", "scores", "step"),
    [
        ("average", [(0.1, 0.1), (0.4, 0.5), (0.5, 0.3)], 4),
        ("names.2-b_c.f1", [(0.1, 0.7), (0.4, 0.5), (0.5, 0.3)], 2),
        ("words.loss", [(0.1, 0.7), (0.4, 0.2), (0.5, 0.3)], 4),
    ],
)
def test_a_run_seals_its_best_weights(
    best: str, scores: list[tuple[float, float]], step: int, run_file: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later steps make the weights worse, as a rate that is far too high would."""
    path = run_file({"topic": "classification", "names.2-b_c": "token_classification"})
    words = "tasks.words={kind: masked_lm, options: {mask_token: '[UNK]', max_length: 32}, "
    data = "train: {path: topic.train.jsonl}, eval: {path: topic.eval.jsonl}}"
    more = [words + data] if "words" in best else []
    kept: list[dict[str, torch.Tensor]] = []

    def measured(prepared: Any, name: str) -> Row:
        if name == "topic":
            kept.append({n: tensor.clone() for n, tensor in prepared.model.trunk.state_dict().items()})
            return {"macro_f1": scores[len(kept) - 1][0]}
        return {"loss" if name == "words" else "f1": scores[len(kept) - 1][1]}

    monkeypatch.setattr(runs, "_measured", measured)
    result = run(path, *more, "training.eval_steps=2", f"training.best={best}", "training.max_steps=6")
    assert result.trained.best_step == result.checkpoint.manifest.provenance["training"]["best_step"] == step
    (file,) = (result.folder / "trunk").glob("model-*.safetensors")
    sealed = load_file(file)
    assert len(kept) == 3
    at = step // 2 - 1
    assert all(torch.equal(tensor, kept[at][name]) for name, tensor in sealed.items())
    assert any(not torch.equal(tensor, kept[2][name]) for name, tensor in sealed.items())


def test_the_average_is_over_each_tasks_own_metric(run_file: Run) -> None:
    """Not over whatever metric comes first: that would be precision for names, accuracy for topics."""
    path = run_file({"topic": "classification", "names": "token_classification"})
    result = run(path, "training.eval_steps=3", "training.best=average", "training.epochs=3")
    evaluated = [row for row in result.trained.log if "eval_average" in row]
    assert evaluated
    for row in evaluated:
        assert row["eval_average"] == pytest.approx((row["eval_topic_macro_f1"] + row["eval_names_f1"]) / 2)


def test_a_metric_that_is_not_measured_is_refused_before_training(run_file: Run) -> None:
    path = run_file({"topic": "classification", "names": "token_classification"})
    allowed = "average, topic.accuracy, topic.macro_f1, topic.mcc, names.f1, names.precision, names.recall, names.acc"
    for best in ("names.mcc", "topic", "loss", "average.f1"):
        with pytest.raises(ConfigError, match=f"training.best: '{best}' is not measured; allowed: {allowed}"):
            run(path, "training.eval_steps=1", f"training.best={best}")
    assert not (path.parent / "out.training").exists()
    check_best("a.b.c", {"a.b": ["c"]})


# what a stock Trainer gets wrong


def test_batches_are_those_of_the_schedule_though_epochs_are_announced_twice(tmp_path: Path) -> None:
    """Transformers and accelerate both call set_epoch; the order must follow from seed and epoch alone."""
    trainer = trainer_of(tmp_path, batch_sizes=BATCHES, num_train_epochs=2, seed=7)
    announced: list[int] = []
    seen: list[tuple[str, list[int]]] = []
    set_epoch, collate = trainer.sampler.set_epoch, trainer.collator

    def told(epoch: int) -> None:
        announced.append(epoch)
        set_epoch(epoch)

    def collated(found: list[Any]) -> dict[str, Any]:
        seen.append((found[0][0].task, [key.index for key, _ in found]))
        return collate(found)

    trainer.sampler.set_epoch, trainer.collator = told, collated
    trainer.train()
    assert announced == sorted(announced)
    assert min(announced.count(0), announced.count(1)) > 1
    assert seen == [*trainer.sampler.schedule.epoch(0), *trainer.sampler.schedule.epoch(1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_task_and_step(bad: float, tmp_path: Path) -> None:
    """Transformers would put the mean of earlier losses in its place (logging_nan_inf_filter) and go on."""

    class Breaks(Toy):
        def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
            output = super().forward(**batch)
            return {**output, "loss": output["loss"] * (bad if batch["task_name"] == "a.b" else 1)}

    trainer = trainer_of(tmp_path, Breaks(), seed=3, max_grad_norm=0.0, logging_nan_inf_filter=True)
    first = [task for task, _ in trainer.sampler.schedule.epoch(0)].index("a.b") + 1
    with pytest.raises(ConfigError, match=rf"the loss of task 'a\.b' is {bad} at step {first}; try a lower"):
        trainer.train()


def test_short_batches_of_several_tasks_weigh_the_same_however_they_are_accumulated(tmp_path: Path) -> None:
    """One step over all batches of an epoch is the mean of their mean losses, weighted: plain descent by hand."""
    count = 14
    trainer = trainer_of(
        tmp_path, weights=WEIGHTS, batch_sizes=BATCHES, optim="sgd", max_grad_norm=0.0, learning_rate=0.1,
        gradient_accumulation_steps=count, max_steps=1, lr_scheduler_type="constant", weight_decay=0.0,
    )  # fmt: skip
    trainer.model.drop.p = 0.0
    twin = Toy()
    twin.drop.p = 0.0
    collate = FeatureCollator(pad_id=0)
    batches = trainer.sampler.schedule.epoch(0)
    losses = [
        WEIGHTS[task] * twin(task_name=task, **collate([items(SIZES[task])[i] for i in indexes]))["loss"]
        for task, indexes in batches
    ]
    assert len(losses) == count
    (torch.stack(losses).sum() / count).backward()
    trainer.train()
    for parameter, before in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(parameter, before - 0.1 * before.grad)


def test_several_accelerators_of_one_process_are_not_used_behind_the_samplers_back(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2  # as Transformers finds on a machine with two, where it would split batches by DataParallel
    trainer = MultitaskTrainer(Toy(), args, train_dataset={task: items(4) for task in SIZES})
    assert trainer.args.n_gpu == 1
    trainer.train()
    assert trainer.model_wrapped is trainer.model


def test_training_again_begins_anew_and_an_ended_state_can_be_prolonged(tmp_path: Path) -> None:
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    trainer = trainer_of(tmp_path, max_steps=4, **given)
    trainer.train()
    state = str(tmp_path / "checkpoint-4")
    longer = trainer_of(tmp_path / "longer", max_steps=6, **given)
    longer.train(resume_from_checkpoint=state)
    assert longer.state.global_step == 6
    ended = trainer_of(tmp_path / "ended", max_steps=4, **given)
    ended.train(resume_from_checkpoint=state)
    assert ended.state.global_step == 4
    assert all(map(torch.equal, ended.model.state_dict().values(), trainer.model.state_dict().values()))
    assert ended.ledger.totals == trainer.ledger.totals
    ended.train()
    assert ended.state.global_step == 4
    assert ended.ledger.totals == trainer.ledger.totals
    assert not all(map(torch.equal, ended.model.state_dict().values(), trainer.model.state_dict().values()))


class Reporting(ReportsMetrics, Toy):
    """Reports how many examples its batch has."""

    def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
        self.report_metrics(size=len(batch["labels"]))
        return super().forward(**batch)


def test_values_reported_in_evaluation_count_by_examples_not_by_rows(tmp_path: Path) -> None:
    """A batch of several rows an example (choices, windows) begins with a longer tensor than it has examples."""
    plain = FeatureCollator(pad_id=0)

    def collate(features: Sequence[Any]) -> dict[str, Any]:
        return {"rows": torch.zeros(7), **plain(features)}

    given = {"data_collator": collate, "eval_dataset": {"topic": items(5)}, "per_device_eval_batch_size": 3}
    trainer = trainer_of(tmp_path, Reporting(), **given)
    assert trainer.evaluate()["eval_topic_size"] == pytest.approx((3 * 3 + 2 * 2) / 5)
