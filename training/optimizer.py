"""Parameter groups: heads may learn faster than the trunk, and biases and norms do not decay. Knows no task."""

from __future__ import annotations

from typing import Any

import torch

from mtserve.model import Model
from training.config import Training


def optimizer(model: Model, settings: Training) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) over all parameters; matrices decay, vectors (biases, norms) do not.

    An output matrix that is tied to the trunk's embeddings belongs to the trunk.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        of_head = name.startswith("heads.") and settings.head_learning_rate is not None
        rate = settings.head_learning_rate if of_head else settings.learning_rate
        assert rate is not None
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    made: list[dict[str, Any]] = [{"params": p, "lr": r, "weight_decay": d} for (r, d), p in groups.items()]
    return torch.optim.AdamW(made, fused=True)
