"""How tasks pull the trunk: sizes of their mean gradients and cosines between these, now and then in a training.

Measured and not acted on (Yu et al., 2020, change gradients by it). Invariant: a training that is measured ends with
the very weights of one that is not; no gradient, random state or mode of the model is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from mtserve.errors import ConfigError
from training.trainer.multitask import MultitaskTrainer
from training.trainer.sampler import Key

Cosines = dict[tuple[str, str], float]
"""(task, other task) -> cosine of their mean gradients; (task, task) -> that between two halves of its examples."""
Sizes = dict[str, float]
"""task -> norm of its mean gradient."""

_EXAMPLES = 64
_AT_ONCE = 8


class GradientCosines(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Measures at so many moments of a training: in the middle of each of `moments` equal parts. What is found goes
    into the log, as rows of `step`, `cosines` and `sizes`.

    A task's gradient is the mean over 64 training examples (or all), evenly spaced in its data, the same at all
    moments, without dropout and weights of tasks. It takes as much memory as the trunk's weights for each task.
    Raises ConfigError for a trunk that stays as it is.
    """

    def __init__(self, trainer: MultitaskTrainer, trunk: nn.Module, *, moments: int) -> None:
        self.trainer, self.moments = trainer, moments
        self.parameters = [p for p in trunk.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("training.gradient_cosines: no weight of the trunk is trained; allowed: 0")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = {round((part + 0.5) * state.max_steps / self.moments) or 1 for part in range(self.moments)}
        if state.global_step in due:
            cosines, sizes = self.measure()
            pairs = [[*pair, value] for pair, value in cosines.items()]
            state.log_history.append({"step": state.global_step, "cosines": pairs, "sizes": sizes})

    def measure(self) -> tuple[Cosines, Sizes]:
        """As the model is now."""
        model, tasks = self.trainer.model, self.trainer.train_dataset.tasks
        mode, found, sums, sizes = model.training, Cosines(), dict[str, Tensor](), Sizes()
        accelerator = torch.accelerator.current_accelerator()
        devices = [] if accelerator is None else [torch.accelerator.current_device_index()]
        with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else accelerator.type):
            model.eval()
            for task, data in tasks.items():
                spaced = np.unique(np.linspace(0, len(data) - 1, _EXAMPLES).astype(int)).tolist()
                halves = [self._gradient(task, spaced[half::2]) for half in range(min(2, len(spaced)))]
                found[task, task] = _cosine(halves[0], halves[-1])
                sums[task] = sum(halves[1:], halves[0])
                sizes[task] = float(sums[task].norm()) / len(spaced)
            model.train(mode)
        return found | {(a, b): _cosine(sums[a], sums[b]) for a, b in combinations(tasks, 2)}, sizes

    def _gradient(self, task: str, indexes: Sequence[int]) -> Tensor:
        """(numbers of the trunk,) the sum of the examples' gradients."""
        trainer = self.trainer
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        for at in range(0, len(indexes), _AT_ONCE):
            keys = [Key(task, index, 1.0, 0) for index in indexes[at : at + _AT_ONCE]]
            batch = trainer._prepare_inputs(trainer.collator(trainer.train_dataset.__getitems__(keys)))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch) * len(keys)
            for sum_, grad in zip(total, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
                if grad is not None:
                    sum_ += grad
        return torch.cat([one.flatten() for one in total])


def mean_cosines(measured: Sequence[Mapping[str, Any]]) -> Cosines:
    """The mean over all moments, of rows of the log."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in measured:
        for a, b, value in one["cosines"]:
            found.setdefault((a, b), []).append(value)
    return {pair: float(np.mean(values)) for pair, values in found.items()}


def mean_sizes(measured: Sequence[Mapping[str, Any]]) -> Sizes:
    """The mean over all moments, of rows of the log; empty where an older version measured none."""
    told = [one["sizes"] for one in measured if "sizes" in one]
    return {task: float(np.mean([sizes[task] for sizes in told])) for task in (told[0] if told else ())}


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(functional.cosine_similarity(a, b, dim=0))
