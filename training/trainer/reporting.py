"""A drop-in `transformers.Trainer` that logs what a model's modules report, and the mix-in for such modules.

    class Mine(ReportsMetrics, nn.Module):
        def forward(self, ...):
            self.report_metrics(mlm_loss=mlm, nsp_loss=nsp, accuracy=right.float())

Any module in the model whose class says `supports_report_metrics = True` gets `report_metrics` as an attribute of the
instance; classes are left as they are. A log row has the mean of each reported value over its steps, micro-batches and
processes, weighted just as the optimiser sees their losses: where a model's loss is the sum of reported parts, `loss`
is the sum of the logged parts. Evaluation has sums of its own, by examples, logged as `eval_<name>`.

A subclass that knows tasks overrides `task_of`, `weigh` and `task_names`, or opens `ledger.batch(phase, task, weight)`
around its forward pass itself, and calls `ledger.add_loss(task, loss, weight=..., examples=..., tokens=...)` once a
batch. The weight of a batch is its share of its accumulation window, 1 / (number of micro-batches), times what its
loss is multiplied with to make up for slices of unequal size (1 on average over the processes). Then, in every row,

    loss = sum over tasks of (task's loss weight) * train_share_<task> * train_loss_<task>

Knows no kind of task and no loss.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from typing_extensions import override

from mtserve.errors import CheckpointError, ConfigError
from training.trainer.ledger import Ledger, Phase, Sums, merge


class ReportsMetrics:
    """Mix-in for an `nn.Module` that reports values; without a trainer that listens a report does nothing."""

    supports_report_metrics: ClassVar[bool] = True

    def report_metrics(self, /, **values: Any) -> None:
        """Tensors, arrays and numbers by name, to be averaged in the log (see `Ledger.report`)."""


class Reporter:
    """The `report_metrics` that a trainer gives a module. A copy, or one read back from a file, reports to nobody."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger = ledger

    def __call__(self, /, **values: Any) -> None:
        if self.ledger is not None:
            self.ledger.report(**values)

    def __reduce__(self) -> tuple[type[Reporter], tuple[()]]:
        return Reporter, ()


class ReportingTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed
    """A Trainer that logs reported values beside its own. It takes what `transformers.Trainer` takes.

    A model whose forward takes **kwargs is not taken to scale its loss by `num_items_in_batch`, as Transformers would
    (huggingface/transformers#47688), unless it says `accepts_loss_kwargs = True`. The logged loss is that of every
    step since the last row, also after resuming between rows, and NaN where there was one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ledger = Ledger()
        self._reporter, self._speakers = Reporter(self.ledger), list[Any]()
        self._batch: tuple[Phase, str | None, float] = ("eval", None, 1.0)
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self.model_accepts_loss_kwargs = getattr(model, "accepts_loss_kwargs", False)
        self._listen()

    def task_of(self, inputs: Any) -> str | None:
        """The task of a batch."""
        return None

    def task_names(self) -> Collection[str]:
        """The tasks that every log row names, also where they had no batch."""
        return ()

    def weigh(self, inputs: Any) -> float:
        """What the loss of a training batch is multiplied with for its size on this process; 1 on average over them."""
        return 1.0

    def rows_of(self, inputs: Any) -> int:
        """Examples in an evaluation batch."""
        return find_batch_size(inputs) or 1

    def reported(self, prefix: str = "eval") -> dict[str, float]:
        """What was reported in evaluation batches and is in no result yet, of all processes."""
        return self.ledger.evaluation(prefix, self._gather)

    # forward passes

    @override
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        window = self.current_gradient_accumulation_steps
        self._batch = ("train", self.task_of(inputs), self.weigh(inputs) / window)
        part = super().training_step(model, inputs, num_items_in_batch)
        self.ledger.add_part(part, window=window)
        return part

    @override
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        rows, state = self.rows_of(inputs), self.accelerator.gradient_state
        if (
            state.end_of_dataloader and state.remainder > 0
        ):  # the rest was put there to make the processes' batches even
            rows = min(rows, max(state.remainder - self.accelerator.process_index * rows, 0))
        self._batch = ("eval", self.task_of(inputs), float(rows))
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    @override
    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Around every forward pass, and none but those: a checkpointed activation is not reported twice."""
        stack = contextlib.ExitStack()
        for module in self._speakers:  # another trainer may have listened meanwhile
            module.report_metrics = self._reporter
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(self.ledger.batch(*self._batch))
        return stack

    def _listen(self) -> None:
        """Find the modules that report. A wrapper (DDP) holds the same ones."""
        modules = self.model.modules()
        self._speakers = [module for module in modules if getattr(type(module), "supports_report_metrics", False)]
        for module in self._speakers:
            module.report_metrics = self._reporter

    # log entries

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put this row's means into a row of training, and those of the whole training into its summary."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.ledger.row(self._gather, tasks=self.task_names()))
        elif "train_loss" in logs and "train_runtime" in logs:
            logs.update(self.ledger.summary(self._gather, tasks=self.task_names()))
        super().log(logs, start_time)

    @override
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in Transformers; reported values are among the metrics. Raises ConfigError where one hides a metric."""
        self._listen()
        self.ledger.clear("eval")
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self.reported(metric_key_prefix)
        if twice := sorted(found.keys() & output.metrics.keys()):
            raise ConfigError(f"{', '.join(twice)}: reported by the model and also a metric; rename one of them")
        output.metrics.update(found)
        return output

    def _gather(self, sums: Sums) -> list[Sums]:
        """The sums of all processes, as JSON in byte tensors: nothing is unpickled."""
        if self.accelerator.num_processes == 1:
            return [sums]
        mine = torch.frombuffer(bytearray(json.dumps(sums).encode()), dtype=torch.uint8).to(self.args.device)
        sizes = self.accelerator.gather(torch.tensor([len(mine)], device=self.args.device)).tolist()
        padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
        rows = self.accelerator.gather(padded[None]).cpu().numpy()  # (processes, longest)
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    # states to resume from

    @override
    def _save_rng_state(self, output_dir: str) -> None:
        """Every process writes its own state, in the step in which all write: a resumed run logs the very same rows."""
        super()._save_rng_state(output_dir)
        state = json.dumps(self.ledger.state_dict())
        (Path(output_dir) / f"ledger-{self.accelerator.process_index}.json").write_text(state, encoding="utf-8")

    @override
    def _init_training_state(
        self, max_steps: Any, num_update_steps_per_epoch: Any, num_train_epochs: Any, resume: Any, trial: Any
    ) -> Any:
        """Begin at nothing, or where the checkpoint was; a window of more processes is shared out among these."""
        made = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        self._listen()
        self.ledger.clear("train")
        if resume is not None and (states := _states(Path(resume))):
            mine, count = self.accelerator.process_index, self.accelerator.num_processes
            windows = [states[rank]["window"] for rank in sorted(states) if rank % count == mine]
            self.ledger.load_state_dict({"window": merge(windows), "whole": states[min(states)]["whole"]})
        return made


def _states(folder: Path) -> dict[int, dict[str, Sums]]:
    """The ledgers in a checkpoint by their process; none in one that another trainer wrote. Raises CheckpointError."""
    states = {}
    for path in folder.glob("ledger-*.json"):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            states[int(path.stem.removeprefix("ledger-"))] = {
                name: merge([state[name]]) for name in ("window", "whole")
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            found = f"{path} is no state of a log ({type(error).__name__}: {error})"
            raise CheckpointError(f"{found}; allowed: the file as it was written, or none") from error
    return states
