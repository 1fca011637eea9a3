"""The demo of the third write-up: a model of several losses, trained by a command line of stock arguments.

    python s3_demo.py --output_dir out --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
        --logging_steps 10 --num_train_epochs 10

1000 rows of ten random floats; the loss is the sum of a tensor, an array, an integer and a float that the model
reports, of which only the tensor can be learned. The others follow from the rows alone, so that their means are known.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from training import ReportingTrainer


def rows(count: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Mock data: ten floats a row, and what a linear model should make of them."""
    values = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": row.sum()} for row in values]


def parts(x: torch.Tensor) -> dict[str, Any]:
    """What the demo's loss has beside the tensor: an array, an integer and a float."""
    return {
        "np": x.detach().cpu().numpy().max(axis=-1),
        "integer": int((x > 0).sum()),
        "fp_num": float(x.square().mean()),
    }


class Demo(nn.Module):
    """One linear layer. It reports only where someone listens, as the write-up advises."""

    supports_report_metrics: bool = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.linear(x).squeeze(-1)
        tensor = nn.functional.mse_loss(made, labels)
        others = parts(x)
        if hasattr(self, "report_metrics"):
            self.report_metrics(tensor=tensor, **others)
        return tensor + float(np.mean(others["np"])) + others["integer"] + others["fp_num"], made


def main(arguments: list[str]) -> ReportingTrainer:
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(arguments)
    trainer = ReportingTrainer(Demo(), args, train_dataset=rows(1000), eval_dataset=rows(100, seed=1))
    trainer.train()
    if args.do_eval and args.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    trainer = main(sys.argv[1:])  # kept: torch can hang where a trainer goes while gloo's threads still hold tensors
    trainer.end()
