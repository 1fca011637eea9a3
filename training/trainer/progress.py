"""Progress of a training on stderr: a bar where that is a terminal, and a line for each log. Changes nothing."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Shows steps and losses; stdout stays free for results."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step", file=sys.stderr, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        losses = [
            f"{name.removeprefix('train_loss_')} {v:.3f}" for name, v in logs.items() if name.startswith("train_loss_")
        ]
        if losses and "loss" in logs and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(losses)}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
