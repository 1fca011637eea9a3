"""What the multitask Trainer costs over the plain one: the same model, loss and batches, side by side in one process.

    python -m benchmarks.trainer_overhead     (the demo's five tasks on the demo's packaged encoder)

The plain side is `transformers.Trainer` over batches that were collated before it starts, so that its data cost
nothing; ours reads features from their Arrow tables, samples, collates, and keeps the ledger of every task. Both take
the same batches in the same order from the same initial weights, and log every ten steps. Runs alternate; each is timed
from the first step's begin to the last step's end. The figure is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mtserve.demo.run import RUN_FILE, packaged_trunk
from training.prepare import prepare
from training.runfile import read_config
from training.trainer.fit import arguments, make_trainer
from training.trainer.progress import Progress


class Clock(TrainerCallback):
    """Seconds from the first step's begin to the last step's end."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.ended - self.started


class Batches(Dataset[Any]):
    """Batches made in advance."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


class Plain(nn.Module):
    """The learner as the plain Trainer wants a model: a batch in, the loss first."""

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        loss: dict[str, torch.Tensor] = self.learner(**batch)
        return loss


class PlainTrainer(Trainer):
    """The stock Trainer in the batches' own order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def timed(trainer: Any) -> float:
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(Progress)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    changes = [f"trunk={packaged_trunk()}", "output=unused", f"training.max_steps={chosen.steps}"]
    config = read_config(RUN_FILE, changes)
    run = prepare(config, base=RUN_FILE.parent)
    before = copy.deepcopy(run.model.state_dict())
    pad_id = run.trunk.spec.pad_id
    ours, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(config.training, seed=config.seed, folder=Path(folder))

        def multitask() -> Any:
            run.model.load_state_dict(before)
            return make_trainer(
                run.model, run.runs, args, settings=config.training, seed=config.seed, pad_id=pad_id
            )  # fmt: skip

        maker = multitask()
        keys = list(maker.sampler)[: chosen.steps]
        wanted = ("task_name", "input_ids", "attention_mask", "token_type_ids", "rows", "targets")
        made = [maker.collator(maker.train_dataset.__getitems__(slice_)) for slice_ in keys]
        batches = Batches([{"batch": {name: batch[name] for name in wanted}} for batch in made])
        plain_args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, max_steps=chosen.steps, logging_steps=10,
            learning_rate=config.training.learning_rate, report_to="none", save_strategy="no", use_cpu=args.use_cpu,
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        for number in range(chosen.rounds + 1):
            mine = timed(multitask())
            run.model.load_state_dict(before)
            theirs = timed(
                PlainTrainer(
                    Plain(maker.model), plain_args, train_dataset=batches, data_collator=lambda items: items[0]
                )
            )
            if number:  # the first round warms up
                ours.append(mine)
                plain.append(theirs)
                sys.stdout.write(f"round {number}: ours {mine:.2f} s, plain {theirs:.2f} s, {mine / theirs - 1:+.2%}\n")
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    sys.stdout.write(
        f"{chosen.steps} steps of the demo, batches of {config.training.batch_size}: "
        f"ours {statistics.median(ours):.2f} s, plain {statistics.median(plain):.2f} s, "
        f"overhead {statistics.median(ratios) - 1:+.2%} (median of {len(ratios)}, {min(ratios) - 1:+.2%} to "
        f"{max(ratios) - 1:+.2%}); torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )


if __name__ == "__main__":
    main()
