"""A Transformers Trainer over many tasks: one loader, batches of one task each, per-task mean losses.

The loss of a batch is the mean over its own examples (or tokens) times the task's weight, and gradient accumulation
divides the sum of a window's losses by its number of batches: never by `num_items_in_batch`, which counts labels of
all tasks together and would weigh tasks by their label counts (huggingface/transformers#47688).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from typing_extensions import override

from mtserve.backends.eager import padded
from mtserve.errors import ConfigError
from mtserve.model import Model
from mtserve.tasks.base import AnyKind, Options
from training.config import Training
from training.examples import Feature, tokens
from training.mixture import batches_an_epoch, proportional
from training.optimizer import optimizer
from training.progress import Progress

_LOGGED = frozenset({"step", "epoch", "loss", "grad_norm", "learning_rate"})


@dataclass(frozen=True)
class TaskRun:
    """What training needs of a task."""

    kind: AnyKind
    options: Options
    features: list[Feature]
    weight: float
    batch_size: int


@dataclass(frozen=True)
class Trained:
    """What a training has cost, and its log: an entry every `logging_steps` steps with `train_loss_<task>`, and a last.

    seconds    of the optimisation alone
    tokens     real ones that went through the trunk
    """

    steps: int
    seconds: float
    tokens: int
    log: list[dict[str, float]]


class _Features(Dataset[tuple[str, Feature]]):
    """The features of one task, each with the task's name."""

    def __init__(self, task: str, features: list[Feature]) -> None:
        self.task, self.features = task, features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[str, Feature]:
        return self.task, self.features[index]


class TaskBatches:
    """The batch sampler: indexes into the tasks' features laid end to end. `set_epoch` may be called again and again.

    `batch_size` None and `drop_last` False keep accelerate from cutting or topping up batches of differing size.
    """

    batch_size = None
    drop_last = False

    def __init__(self, tasks: Mapping[str, TaskRun], *, seed: int) -> None:
        self.sizes = {name: len(task.features) for name, task in tasks.items()}
        self.batch_sizes = {name: task.batch_size for name, task in tasks.items()}
        self.seed, self.epoch = seed, 0
        ends = list(accumulate(self.sizes.values(), initial=0))
        self.starts = dict(zip(self.sizes, ends[:-1], strict=True))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return batches_an_epoch(self.sizes, self.batch_sizes)

    def __iter__(self) -> Iterator[list[int]]:
        for task, indexes in proportional(self.sizes, self.batch_sizes, seed=self.seed, epoch=self.epoch):
            yield [self.starts[task] + index for index in indexes]


class MultitaskTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed
    """Trains a `Model` on several tasks at once."""

    loss_is_scaled_for_ga = False

    def __init__(
        self, model: Model, tasks: Mapping[str, TaskRun], *, settings: Training, seed: int, pad_id: int, scratch: str
    ) -> None:
        self.tasks, self.pad_id = tasks, pad_id
        self.sampler = TaskBatches(tasks, seed=seed)
        self.features: ConcatDataset[tuple[str, Feature]] = ConcatDataset(
            [_Features(name, task.features) for name, task in tasks.items()]
        )
        self.tokens_seen = 0
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}
        made = (optimizer(model, settings), None)
        super().__init__(model, _arguments(settings, seed, scratch), train_dataset=self.features, optimizers=made)
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress())

    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(DataLoader(self.features, batch_sampler=self.sampler, collate_fn=self._collate))

    def _collate(self, items: Sequence[tuple[str, Feature]]) -> dict[str, Any]:
        """A batch of one task: padded ids, mask and type ids, each (rows, seq), beside the rows and targets."""
        features = [feature for _, feature in items]
        ids, mask, type_ids = padded([row for rows, _ in features for row in rows], pad_id=self.pad_id)
        self.tokens_seen += tokens(features)
        rows, targets = [rows for rows, _ in features], [target for _, target in features]
        return {"task": items[0][0], "ids": ids, "mask": mask, "type_ids": type_ids, "rows": rows, "targets": targets}

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The batch's mean loss times its task's weight; `num_items_in_batch` is not used (see the module)."""
        name = inputs["task"]
        task = self.tasks[name]
        logits = model(name, inputs["ids"], inputs["mask"], inputs["type_ids"])
        loss = task.kind.loss(logits.float(), inputs["rows"], inputs["targets"], task.options)
        total, count = self._sums.get(name, (torch.zeros_like(loss), 0))
        self._sums[name] = (total + loss.detach() * len(inputs["rows"]), count + len(inputs["rows"]))
        return loss * task.weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each task's mean loss, not weighted, over the examples since the last log.

        Raises ConfigError for a loss that is not finite: what follows it would be no model.
        """
        for name in sorted(self._sums):
            total, count = self._sums.pop(name)
            loss = logs[f"train_loss_{name}"] = total.item() / count
            if not math.isfinite(loss):
                found = f"the loss of task {name!r} is {loss} at step {self.state.global_step}"
                raise ConfigError(f"{found}; try a lower learning_rate or more warmup_share")
        super().log(logs, start_time)


def fit(model: Model, tasks: Mapping[str, TaskRun], *, settings: Training, seed: int, pad_id: int) -> Trained:
    """Train the model in place, on an accelerator where there is one; it comes back on the CPU, in evaluation mode."""
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer insists on a folder; nothing of it is kept
        trainer = MultitaskTrainer(model, tasks, settings=settings, seed=seed, pad_id=pad_id, scratch=scratch)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    model.to("cpu").eval()
    logged = [
        {name: value for name, value in entry.items() if name in _LOGGED or name.startswith("train_loss_")}
        for entry in trainer.state.log_history
    ]
    log = [entry for entry in logged if any(name.startswith("train_loss_") for name in entry)]
    return Trained(trainer.state.global_step, seconds, trainer.tokens_seen, log)


def _arguments(settings: Training, seed: int, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        seed=seed,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        gradient_accumulation_steps=settings.gradient_accumulation,
        warmup_steps=settings.warmup_share,  # below 1 it is a share of all steps
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=settings.scheduler,
        bf16=settings.bf16,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        average_tokens_across_devices=False,
    )
