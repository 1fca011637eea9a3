"""A wall-clock budget: training stops after the step in which it runs out, on all processes at once. Saves nothing."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback


class Deadline(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Ends training at `ends_at`, a time of `time.monotonic`."""

    def __init__(self, ends_at: float) -> None:
        self.ends_at, self.reached = ends_at, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        over = torch.tensor(float(time.monotonic() >= self.ends_at), device=args.device)
        if args.world_size > 1:  # clocks differ, and a process that went on alone would wait for the others forever
            distributed.all_reduce(over, op=distributed.ReduceOp.MAX)
        if over.item():
            self.reached = control.should_training_stop = True
