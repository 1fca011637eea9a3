"""A Transformers Trainer over many tasks: one loader, batches of one task each, per-task mean losses, exact resume.

The loss of a batch is the mean over its own examples (or tokens) times the task's weight, and gradient accumulation
divides the sum of a window's losses by its number of batches: never by `num_items_in_batch`, which counts labels of
all tasks together and would weigh tasks by their label counts (huggingface/transformers#47688). With several processes
each has a slice of the batch, and slices of unequal size count by their size. Knows no kind: a model is anything that
answers `model(task_name=…, **batch)` with a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainingArguments
from typing_extensions import override

from mtserve.errors import ConfigError
from training.stock.collation import FeatureCollator
from training.trainer.arguments import check_arguments
from training.trainer.items import Collate, Collator, TaskItems
from training.trainer.mixture import MixtureConfig, Schedule
from training.trainer.optimizer import make_optimizer
from training.trainer.reporting import ReportingTrainer
from training.trainer.sampler import Key, TaskBatches

Evaluator = Callable[[], Mapping[str, Mapping[str, float]]]
"""Metrics of each task; the first of a task stands for it in the average."""

ComputeMetrics = Callable[[Any], dict[str, float]]
"""As in Transformers: from an EvalPrediction to metrics by name."""

_WEIGHTS = "model.safetensors"


class MultitaskTrainer(ReportingTrainer):
    """Trains a model on several tasks at once.

    train_dataset    task -> data set of items; one that differs between epochs has `of_epoch(indexes, epoch)`
    data_collator    items -> batch, for all tasks or one a task; by default features are padded to the longest
    eval_dataset     task -> data set, for `compute_metrics` (one for all tasks or one a task)
    evaluator        instead of `eval_dataset`: measures the model in its own way
    mixture          which task comes when; batch sizes are the arguments' unless `batch_sizes` names the task
    weights          task -> factor of its loss, 1 by default
    groups           parameter groups for the optimizer that the arguments name

    Raises ConfigError for arguments that have no meaning here (`training/trainer/arguments.py` has the table).
    """

    loss_is_scaled_for_ga = False
    optimizer: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Mapping[str, Any],
        data_collator: Collate | Mapping[str, Collate] | None = None,
        eval_dataset: Mapping[str, Any] | None = None,
        compute_metrics: ComputeMetrics | Mapping[str, ComputeMetrics] | None = None,
        evaluator: Evaluator | None = None,
        mixture: MixtureConfig | None = None,
        batch_sizes: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        args = args or TrainingArguments(output_dir="tmp_trainer")
        check_arguments(args)
        if args.fp16 and args.device.type == "cpu":
            raise ConfigError("fp16 would change nothing on a CPU, where there is no float16 training; allowed: bf16")
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would cut up batches that the sampler has made; DDP does not
        by_task = (of for of in (data_collator, compute_metrics) if isinstance(of, Mapping))
        self._check_names(train_dataset, eval_dataset or {}, batch_sizes or {}, weights or {}, *by_task)
        if isinstance(data_collator, Mapping):
            self._check_names(data_collator, train_dataset, where="data_collator")
        self.collator = Collator(data_collator or FeatureCollator(pad_id=_pad_id(processing_class, model)))
        self.evaluator, self.task_weights, self._groups = evaluator, dict(weights or {}), groups
        self._metrics_of = compute_metrics
        self.sampler = TaskBatches(
            _schedule(train_dataset, batch_sizes or {}, mixture or MixtureConfig(), args), world_size=args.world_size
        )
        super().__init__(
            model,
            args,
            data_collator=self.collator,
            train_dataset=TaskItems(train_dataset, self.sampler),
            eval_dataset=dict(eval_dataset) if eval_dataset is not None else {} if evaluator else None,
            callbacks=list(callbacks or ()),
            processing_class=processing_class,
        )
        self.model_accepts_loss_kwargs = False
        self.label_names = ["labels"]  # in a model that takes **kwargs Transformers finds none, and measures nothing
        self._over = False

    @staticmethod
    def _check_names(tasks: Mapping[str, Any], *others: Mapping[str, Any], where: str = "train_dataset") -> None:
        for name in (name for other in others for name in other):
            if name not in tasks:
                raise ConfigError(f"{name!r} is no task of {where}; allowed: {', '.join(tasks)}")

    # data

    @override
    def get_train_dataloader(self) -> Any:
        return self._loader(self.train_dataset, batch_sampler=self.sampler)

    def _loader(self, items: TaskItems, **order: Any) -> Any:
        args = self.args
        loader = DataLoader(
            items,
            collate_fn=self.collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # else workers, unless they persist, draw on dropout's in each epoch
            **order,
        )
        return self.accelerator.prepare(loader)

    # the loss

    @override
    def task_of(self, inputs: Any) -> str | None:
        task: str = inputs["task_name"]
        return task

    @override
    def task_names(self) -> Collection[str]:
        return list(self.train_dataset.tasks)

    @override
    def weigh(self, inputs: Any) -> float:
        share: float = inputs["share"]
        return share

    @override
    def rows_of(self, inputs: Any) -> int:
        rows: int = inputs["examples"]
        return rows

    @override
    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's mean loss times its task's weight and its share of the batch of all processes.

        `num_items_in_batch` is not used (see the module). In evaluation the plain mean loss, and the logits.
        """
        batch = dict(inputs)
        task, share, examples = batch["task_name"], batch.pop("share"), batch.pop("examples")
        output = model(**batch)
        loss = output["loss"]
        if not model.training:
            return (loss, {"loss": loss, "logits": output["logits"]}) if return_outputs else loss
        tokens = batch["attention_mask"].sum() if examples and "attention_mask" in batch else 0
        weight = share / self.current_gradient_accumulation_steps
        self.ledger.add_loss(task, loss, weight=weight, examples=examples, tokens=tokens)
        return loss * (self.task_weights.get(task, 1.0) * share)

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log each task's part beside the combined loss. Raises ConfigError for a loss that is not finite: what follows
        it would be no model."""
        super().log(logs, start_time)
        for task in self.train_dataset.tasks:
            loss = logs.get(f"train_loss_{task}", 0.0)
            if not math.isfinite(loss):
                found = f"the loss of task {task!r} is {loss} at step {self.state.global_step}"
                raise ConfigError(f"{found}; try a lower learning_rate or more warmup_share")

    # the optimizer

    @override
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self._groups is not None:
            self.optimizer = make_optimizer(self.args, self.model, self._groups)
        return super().create_optimizer(model)

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            raise ConfigError(f"lr_scheduler_kwargs: {error}") from error

    # evaluation

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Every task's metrics as `eval_<task>_<metric>`, and `eval_average` over the first metric of each task.

        All of them together are logged once and given to callbacks once, so that stopping early and keeping the best
        may look at any of them. `eval_dataset` may be another mapping from task to data set.
        """
        found: Any  # task -> metric -> value
        if self.evaluator is not None and eval_dataset is None:
            found = {task: {name: float(v) for name, v in of.items()} for task, of in self.evaluator().items()}
            found = self._gather(found)[0]  # what follows from a metric must be the same in all processes
        else:
            sets = eval_dataset if eval_dataset is not None else self.eval_dataset
            if not isinstance(sets, Mapping) or not sets:
                raise ConfigError("evaluation needs eval_dataset: a mapping from task to data set")
            self._check_names(self.train_dataset.tasks, sets)
            found = {task: self._measured(task, data, ignore_keys) for task, data in sets.items()}
        metrics = {f"{metric_key_prefix}_average": fmean(next(iter(of.values())) for of in found.values())}
        for task, name in ((task, name) for task, of in found.items() for name in of):
            if (key := f"{metric_key_prefix}_{task}_{name}") in metrics:
                raise ConfigError(f"two metrics would be called {key}; rename one of the tasks")
            metrics[key] = found[task][name]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, task: str, data: Any, ignore_keys: list[str] | None) -> dict[str, float]:
        """One task's own metrics, then its loss, over a data set."""
        of = self._metrics_of
        self.compute_metrics = of.get(task) if isinstance(of, Mapping) else of
        keys = [Key(task, index, 1.0, 0) for index in range(len(data))]
        loader = self._loader(TaskItems({task: data}), sampler=keys, batch_size=self.args.per_device_eval_batch_size)
        only_loss = True if self.compute_metrics is None else None
        output = self.evaluation_loop(
            loader, task, prediction_loss_only=only_loss, ignore_keys=ignore_keys, metric_key_prefix=task
        )
        own = {name.removeprefix(f"{task}_"): value for name, value in output.metrics.items()}
        return {**{n: v for n, v in own.items() if n != "loss" and "_time" not in n}, "loss": own["loss"]}

    @override
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if "labels" not in inputs:
            raise ConfigError(f"eval_dataset: task {inputs['task_name']!r} has items without labels to measure against")
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # states to resume from: weights that several tasks share are written once

    @override
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.model), str(folder / _WEIGHTS), metadata={"format": "pt"})

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / _WEIGHTS
        if not path.is_file():
            raise ConfigError(f"{resume_from_checkpoint} holds no {_WEIGHTS} to resume from")
        load_model(self.model if model is None else model, path)

    @override
    def _init_training_state(self, max_steps: Any, per_epoch: Any, epochs: Any, resume: Any, trial: Any) -> Any:
        made = super()._init_training_state(max_steps, per_epoch, epochs, resume, trial)
        stoppers = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        stopped = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stoppers)
        self._over = resume is not None and (stopped or self.state.global_step >= self.state.max_steps)
        return made

    @override
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where training goes on from the state at its end: Transformers would make a step before it stops."""
        if self._over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @override
    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _pad_id(*sources: Any) -> int:
    """That of the tokenizer, else of the model's config; masked positions may hold any id."""
    found = (getattr(source, "pad_token_id", None) for one in sources for source in (one, getattr(one, "config", None)))
    return next((pad for pad in found if pad is not None), 0)


def _schedule(
    tasks: Mapping[str, Any], batch_sizes: Mapping[str, int], mixture: MixtureConfig, args: TrainingArguments
) -> Schedule:
    """The schedule of all processes together: its batches are as many times larger as there are processes."""
    sizes = {task: len(data) for task, data in tasks.items()}
    each = {task: batch_sizes.get(task, args.per_device_train_batch_size) * args.world_size for task in tasks}
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        batches = sum(math.ceil(size / each[task]) for task, size in sizes.items())
        epochs = math.ceil(args.max_steps / math.ceil(batches / args.gradient_accumulation_steps))
    seed = args.seed if args.data_seed is None else args.data_seed
    lengths = {task: _lengths(task, data) for task, data in tasks.items()} if mixture.group_by_length else None
    return Schedule(sizes, each, mixture, seed=seed, epochs=epochs, lengths=lengths)


def _lengths(task: str, data: Any) -> Sequence[int]:
    """Tokens of each example. Raises ConfigError for a data set that does not say."""
    if hasattr(data, "lengths"):
        lengths: Sequence[int] = data.lengths
        return lengths
    if "input_ids" not in getattr(data, "column_names", ()):
        raise ConfigError(f"group_by_length: the data of {task!r} has neither lengths nor a column input_ids")
    return [sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids) for ids in data["input_ids"]]
