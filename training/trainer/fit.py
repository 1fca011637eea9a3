"""Training a model as a run's settings say: arguments, parameter groups, states to resume from, best weights, deadline.

Knows no files but its own folder of states, and no engine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mtserve.errors import ConfigError
from mtserve.model import Model
from training.config import Training
from training.states import newest
from training.trainer.cosines import GradientCosines
from training.trainer.deadline import Deadline
from training.trainer.frozen import HeadLearner, Outputs
from training.trainer.learner import Features, FeatureSet, Learned, Learner, collate
from training.trainer.lora import add_adapters, merge_adapters
from training.trainer.mixout import mix, unmix
from training.trainer.mixture import MixtureConfig
from training.trainer.multitask import Evaluator, MultitaskTrainer
from training.trainer.optimizer import freeze, parameter_groups
from training.trainer.progress import Progress

_KEPT = ("step", "epoch", "loss", "grad_norm", "learning_rate")
_LOSS_LIKE = ("loss", "perplexity")
_FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class TaskRun:
    """What training needs of a task; `lengths` are tokens of each example, for batches of similar ones."""

    learned: Learned
    features: Features
    weight: float = 1.0
    batch_size: int | None = None
    lengths: Sequence[int] = ()


@dataclass(frozen=True)
class Trained:
    """What a training has cost, and its log: rows with the tasks' losses, shares and counts (see `Ledger.row`) every
    `logging_steps` steps, and one of each evaluation.

    seconds    of the optimisation, with evaluations in between; of a resumed run since it was resumed
    tokens     real ones of all batches, counted once where R-Drop passes them twice
    ended      why it stopped: `finished`, `no improvement` or `out of time`
    best_step  whose weights the model has; None where they are the last ones
    cosines    of the tasks' gradients: a row a moment (trainer/cosines.py)
    """

    steps: int
    seconds: float
    tokens: int
    log: list[dict[str, float]]
    ended: str = "finished"
    best_step: int | None = None
    cosines: list[dict[str, Any]] = field(default_factory=list)


def fit(
    model: Model,
    tasks: Mapping[str, TaskRun],
    *,
    settings: Training,
    seed: int,
    pad_id: int,
    mixture: MixtureConfig | None = None,
    evaluator: Evaluator | None = None,
    folder: Path | None = None,
    resume: bool = False,
    ends_at: float | None = None,
    outputs: Mapping[str, Outputs] | None = None,
) -> Trained:
    """Train the model in place, on an accelerator where there is one; it comes back on the CPU, in evaluation mode.

    folder    for states to resume from, the best weights and TensorBoard's files; left there. `resume` goes on from the
              last state in it
    ends_at   a time of `time.monotonic` after which no further step begins
    outputs   of each task, if the trunk is to stay as it is: heads alone are trained, on these

    Raises ConfigError for settings that cannot work, for nothing to resume from, and for a loss that is not finite.
    """
    adapters = None if settings.lora is None else add_adapters(model.trunk, settings.lora)
    with _scratch(folder) as home:
        trainer = make_trainer(
            model, tasks, arguments(settings, seed=seed, folder=Path(home)),
            settings=settings, seed=seed, pad_id=pad_id, mixture=mixture, evaluator=evaluator, outputs=outputs,
        )  # fmt: skip
        deadline = Deadline(float("inf") if ends_at is None else ends_at)
        trainer.add_callback(deadline)
        if settings.gradient_cosines and outputs is None:
            trainer.add_callback(GradientCosines(trainer, model.trunk, moments=settings.gradient_cosines))
        state = newest(Path(home)) if resume else None
        if resume and state is None:
            raise ConfigError(f"resume: {home} holds no state to go on from")
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=state and str(state))
        seconds = time.monotonic() - started
    model.to("cpu").eval()
    unmix(model.trunk)
    if adapters is not None:
        merge_adapters(adapters)
    progress = trainer.state
    ended = "out of time" if deadline.reached else "no improvement"
    if progress.global_step >= progress.max_steps:
        ended = "finished"
    return Trained(
        steps=progress.global_step,
        seconds=seconds,
        tokens=sum(total["tokens"] for total in trainer.ledger.totals.values()),
        log=_log(progress.log_history),
        ended=ended,
        best_step=progress.best_global_step if settings.best else None,
        cosines=[entry for entry in progress.log_history if "cosines" in entry],
    )


def make_trainer(
    model: Model,
    tasks: Mapping[str, TaskRun],
    args: TrainingArguments,
    *,
    settings: Training,
    seed: int,
    pad_id: int,
    mixture: MixtureConfig | None = None,
    evaluator: Evaluator | None = None,
    outputs: Mapping[str, Outputs] | None = None,
) -> MultitaskTrainer:
    """The Trainer of a run, before its first step."""
    learned = {name: task.learned for name, task in tasks.items()}
    learner: nn.Module = Learner(model, learned)
    collator: Any = partial(collate, pad_id=pad_id)
    if outputs is not None:
        freeze(model, ["trunk"])
        learner = heads = HeadLearner(model, learned, outputs)
        collator = {name: partial(heads.collate, name) for name in tasks}
        model.to(args.device)  # the Trainer moves the heads there, and evaluations need both
    elif settings.freeze:
        freeze(model, settings.freeze)
    if settings.mixout:
        mix(model.trunk, settings.mixout)
    groups = parameter_groups(
        model,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    with _said():
        trainer = MultitaskTrainer(
            learner,
            args,
            train_dataset={
                name: FeatureSet(name, task.features, kind=task.learned.kind, seed=seed, lengths=task.lengths)
                for name, task in tasks.items()
            },
            data_collator=collator,
            evaluator=evaluator,
            mixture=mixture,
            batch_sizes={name: task.batch_size or settings.batch_size for name, task in tasks.items()},
            weights={name: task.weight for name, task in tasks.items()},
            groups=groups,
            callbacks=[Progress(), *([EarlyStoppingCallback(settings.patience)] if settings.patience else [])],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def multiplies_bf16() -> bool:
    """Whether the accelerator, or without one the processor, multiplies bf16 matrices itself; else fp32 is faster."""
    if torch.accelerator.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False)) if torch.cuda.is_available() else False
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def arguments(settings: Training, *, seed: int, folder: Path) -> TrainingArguments:
    """The run's settings as TrainingArguments. Raises ConfigError for values that these refuse."""
    every = settings.eval_steps
    saved = settings.save_steps or (every if settings.best else None)
    wanted: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        "optim": settings.optimizer,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "warmup_steps": settings.warmup_share,  # below 1 it is a share of all steps
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "lr_scheduler_type": settings.scheduler,
        "bf16": multiplies_bf16() if settings.bf16 == "auto" else settings.bf16,
        "fp16": settings.fp16,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no" if every is None else "steps",
        "eval_steps": every,
        "save_strategy": "no" if saved is None else "steps",
        "save_steps": saved or 500,
        "save_total_limit": 2,
        "load_best_model_at_end": settings.best is not None,
        "restore_callback_states_from_checkpoint": True,  # how long there was no improvement
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "average_tokens_across_devices": False,
    }
    if settings.gradient_checkpointing:
        wanted["activation_checkpointing"] = True
    if settings.best is not None:
        wanted["metric_for_best_model"] = "eval_" + "_".join(settings.best.rsplit(".", 1))
        wanted["greater_is_better"] = not settings.best.endswith(_LOSS_LIKE)
    given = dict(settings.arguments)
    with _said():
        if settings.scheduler in _FOLLOW_A_METRIC:
            mode = "max" if wanted.get("greater_is_better") else "min"
            given["lr_scheduler_kwargs"] = {"mode": mode, **(given.get("lr_scheduler_kwargs") or {})}
        return TrainingArguments(**{**wanted, **given})


@contextmanager
def _said() -> Iterator[None]:
    """What Transformers refuses, as a sentence."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"training: {str(error).splitlines()[0]}") from error


def check_best(best: str | None, metrics: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError unless `best` is `average` or a `task.metric` of these, before a step is trained."""
    names = ["average", *(f"{task}.{name}" for task, of in metrics.items() for name in of)]
    if best is not None and best not in names:
        raise ConfigError(f"training.best: {best!r} is not measured; allowed: {', '.join(names)}")


def _scratch(folder: Path | None) -> AbstractContextManager[str]:
    """The Trainer insists on a folder; without one of the caller's, nothing of it is kept."""
    return tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))


def _log(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The rows of losses and the evaluations, without the Trainer's summary and what only it needs."""
    told = [entry for entry in history if "loss" in entry or any(name.startswith("eval_") for name in entry)]
    return [{n: v for n, v in e.items() if n in _KEPT or n.startswith(("train_", "eval_"))} for e in told]
