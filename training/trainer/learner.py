"""The model in training: a trunk with heads and each task's loss, and the tasks' features as batches for it.

A batch is of one task; the loss is the kind's own mean over the batch's examples (or tokens). Knows no Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from mtserve.backends.eager import padded
from mtserve.model import Model
from mtserve.rows import Row
from mtserve.tasks.base import PLAIN, AnyKind, Kind, LossTerms, Options
from training.data.examples import Feature


@dataclass(frozen=True)
class Learned:
    """What the loss of a task needs."""

    kind: AnyKind
    options: Options
    terms: LossTerms = PLAIN


class Learner(nn.Module):
    """A `Model` with the losses of its tasks."""

    def __init__(self, model: Model, tasks: Mapping[str, Learned]) -> None:
        super().__init__()
        self.model, self.tasks = model, tasks

    def forward(
        self,
        task_name: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
    ) -> dict[str, Tensor]:
        """The batch's mean loss. All three tensors are (rows, seq); `rows` and `targets` have one entry an example."""
        task = self.tasks[task_name]
        logits = self.model(task_name, input_ids, attention_mask, token_type_ids)
        return {"loss": task.kind.loss(logits.float(), rows, targets, task.options, task.terms)}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **placement: Any
    ) -> None:
        """Compute the trunk's activations again in the backward pass (Chen et al., 2016); the Trainer calls this."""
        self.model.trunk.activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs, **placement
        )


class Features(Protocol):
    """Features that are read several at a time."""

    def __len__(self) -> int: ...
    def of(self, indexes: Sequence[int]) -> list[Feature]: ...


class FeatureSet(Dataset[Feature]):
    """The features of one task. What is random in them (masked words) follows from seed, epoch, task and index."""

    def __init__(self, task: str, features: Features, *, kind: AnyKind, seed: int) -> None:
        self.task, self.features, self.kind, self.seed = task, features, kind, seed

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Feature:
        return self.of_epoch([index], 0)[0]

    def of_epoch(self, indexes: Sequence[int], epoch: int) -> list[Feature]:
        """Several features as an epoch has them."""
        found = self.features.of(indexes)
        if type(self.kind).corrupt is Kind.corrupt:
            return found
        draws = [np.random.default_rng([self.seed, epoch, index, *self.task.encode()]) for index in indexes]
        return [self.kind.corrupt(*feature, draw) for feature, draw in zip(found, draws, strict=True)]


def collate(features: Sequence[Feature], *, pad_id: int) -> dict[str, Any]:
    """A batch for `Learner.forward`, padded at the right to its longest row."""
    ids, mask, type_ids = padded([row for rows, _ in features for row in rows], pad_id=pad_id)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": type_ids,
        "rows": [rows for rows, _ in features],
        "targets": [target for _, target in features],
    }
