"""The model in training: a trunk with heads and each task's loss, and the tasks' features as batches for it.

A batch is of one task; the loss is the kind's own mean over the batch's examples (or tokens). Knows no Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached
from torch.utils.data import Dataset

from mtserve.backends.staging import padded
from mtserve.heads import PairHead, TrunkStates
from mtserve.model import Model
from mtserve.rows import Row, texts_of
from mtserve.tasks.base import IGNORED, PLAIN, AnyKind, Kind, LossTerms, Options
from training.data.examples import Feature
from training.trainer.on_cpu import OnCpu

_WORTH, _FEWEST = 0.15, 256
"""What a pass of its own must save of the tokens that some rows have together, and at least, in tokens."""
_SHARES = ("dropout", "dropout_prob", "attention_dropout")
_WIDE = frozenset({"causal_lm", "masked_lm"})
"""Heads whose logits are as wide as the vocabulary, and which look at each position alone."""


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
        self._recomputes = False

    def forward(
        self,
        task_name: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
    ) -> dict[str, Tensor]:
        """The batch's mean loss. All three tensors are (rows, seq); `rows` and `targets` have one entry an example.

        With r_drop in training there are two passes, each with dropout of its own, and the loss is
        (L1 + L2 + r_drop * disagreement) / 2: R-Drop (Liang et al., 2021), halved, so that rates keep their meaning.
        """
        kind, options, terms = (task := self.tasks[task_name]).kind, task.options, task.terms
        tensors, twice = (input_ids, attention_mask, token_type_ids), terms.r_drop > 0 and self.training
        passes = [self._pass(task_name, tensors, rows, targets) for _ in range(1 + twice)]
        losses = [kind.loss(logits, rows, counted, options, terms) for logits, counted in passes]
        if not twice:
            return {"loss": losses[0]}
        (one, counted), (two, _) = passes
        apart = kind.disagreement(one, two, rows, counted, options)
        return {"loss": (losses[0] + losses[1] + terms.r_drop * apart) / 2}

    def _pass(
        self, task: str, tensors: tuple[Tensor, ...], rows: Sequence[Sequence[Row]], targets: Sequence[Any]
    ) -> tuple[Tensor, Sequence[Any]]:
        """fp32 logits of one pass, and the targets that stand for them."""
        spec, on_cpu = self.model.specs[task], tensors[0].device.type == "cpu"
        with cached(), OnCpu() if on_cpu and not self._recomputes else nullcontext():
            if spec.architecture in _WIDE:
                logits, targets = self._counted(task, tensors, targets)
            else:
                logits = self._logits(task, tensors, list(chain.from_iterable(rows)))
        return logits.float(), targets

    def _logits(self, task_name: str, tensors: tuple[Tensor, ...], rows: Sequence[Row]) -> Tensor:
        """As the model gives them. On a CPU rows that differ much in length pass the trunk in groups, padded to the
        longest of each."""
        head = self.model.head(task_name)
        pairs, on = isinstance(head, PairHead), tensors[0].device
        if head.per_token or on.type != "cpu":
            return self.model(task_name, *tensors, texts(rows).to(on) if pairs else None)  # type: ignore[no-any-return]
        lengths = [len(row) for row in rows]
        order, found = list[int](), list[Tensor]()
        for group in alike(lengths):
            at, seq = torch.tensor(group), max(lengths[i] for i in group)
            some = texts([rows[i] for i in group]) if pairs else None
            found.append(self.model(task_name, *(tensor[at, :seq] for tensor in tensors), some))
            order += group
        return torch.cat(found)[torch.tensor(order).argsort()]

    def _counted(self, task_name: str, tensors: tuple[Tensor, ...], targets: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """(1, counted, n_out) logits of the positions that have a target, and those targets: a prompt's logits are as
        wide as the vocabulary, and no loss reads them."""
        ids, mask, type_ids = tensors
        states = self.model.states(ids, mask, type_ids)
        nested = isinstance(targets[0], list)  # several rows an example
        wanted = np.full(tuple(ids.shape), IGNORED, np.int64)
        for row, target in enumerate(chain.from_iterable(targets) if nested else targets):
            wanted[row, : len(target)] = target
        at = torch.from_numpy(wanted != IGNORED).to(ids.device)
        hidden = states.hidden[at][None]  # (1, counted, hidden)
        every = torch.ones(hidden.shape[:2], dtype=mask.dtype, device=mask.device)
        logits = self.model.head(task_name)(TrunkStates(hidden, None, every))
        counted = wanted[wanted != IGNORED]
        return logits, [[counted]] if nested else [counted]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **placement: Any
    ) -> None:
        """Compute the trunk's activations again in the backward pass (Chen et al., 2016); the Trainer calls this."""
        self._recomputes = True  # in the backward pass, where no context is entered again
        self.model.trunk.activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs, **placement
        )


def has_dropout(trunk: nn.Module) -> bool:
    """Whether two passes of a trunk in training mode may differ: by a layer of dropout, or by a share that one hands to
    its attention."""
    layers = (module.p for module in trunk.modules() if isinstance(module, nn.Dropout))
    given = (getattr(module, name, 0) for module in trunk.modules() for name in _SHARES)
    return any(share > 0 for share in (*layers, *given) if isinstance(share, float))


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indexes of rows in groups of similar lengths, the longest first. A group is cut in two where that saves more than
    `_WORTH` of the tokens that it has, padding included."""
    return _cut(sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)), lengths)


def _cut(rows: list[int], lengths: Sequence[int]) -> list[list[int]]:
    longest, count = lengths[rows[0]], len(rows)
    saved = [(count - at) * (longest - lengths[row]) for at, row in enumerate(rows)]  # if a group begins here
    at = max(range(count), key=lambda at: saved[at])
    if saved[at] <= max(_FEWEST, _WORTH * longest * count):
        return [rows]
    return _cut(rows[:at], lengths) + _cut(rows[at:], lengths)


class Features(Protocol):
    """Features that are read several at a time."""

    def __len__(self) -> int: ...
    def of(self, indexes: Sequence[int]) -> list[Feature]: ...


class FeatureSet(Dataset[Feature]):
    """The features of one task. What is random in them (masked words) follows from seed, epoch, task and index.
    `lengths` are tokens of each example, where batches are to be of similar ones."""

    def __init__(self, task: str, features: Features, *, kind: AnyKind, seed: int, lengths: Sequence[int] = ()) -> None:
        self.task, self.features, self.kind, self.seed, self.lengths = task, features, kind, seed, lengths

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


def texts(rows: Sequence[Row]) -> Tensor:
    """(rows, seq) to which text of a pair each token belongs."""
    return torch.from_numpy(texts_of(rows))


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
