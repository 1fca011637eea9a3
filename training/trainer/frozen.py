"""Heads alone, on a trunk that stays as it is: what it computes of each row is computed once, and kept on disk.

Invariants (tests/training/test_frozen.py holds them):
1. A file of outputs has its name only once it is whole, and the name follows from all that its content depends on: the
   trunk's fingerprint, which states are kept, and the rows in their order. So it is never stale, and another run with
   the same rows (other rates, another seed) takes it as it is.
2. Each distinct row of a task is computed once.
3. A head sees of a row what it would see of the trunk in evaluation mode, whatever other rows are in its batch.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mtserve.backends.staging import padded
from mtserve.batching import padded_cost, plan
from mtserve.errors import ConfigError
from mtserve.heads import Head, TrunkStates
from mtserve.model import Model, module_name
from mtserve.rows import Row
from mtserve.tasks.base import Reads
from mtserve.trunk import hidden_size
from training.data.examples import Feature
from training.trainer.learner import Learned, texts

_BUDGET = 8192  # tokens of a pass of the trunk
_SAID = 64 * 2**20


@dataclass(frozen=True)
class Outputs:
    """What the trunk computed of the rows of a task.

    states   (positions, hidden) fp32: one a row, or one a token for a head that reads all
    places   by key of a row, its first position and how many it has
    pooled   whether they are the pooler's
    """

    states: np.ndarray
    places: Mapping[Any, tuple[int, int]]
    pooled: bool = False

    def of(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`hidden` (rows, seq, hidden), padded at the right, `mask` and `texts` (rows, seq) of some rows."""
        spans = [self.places[row.key] for row in rows]
        longest = max(count for _, count in spans)
        hidden = np.zeros((len(rows), longest, self.states.shape[1]), np.float32)
        mask = np.zeros((len(rows), longest), np.int64)
        for at, (first, count) in enumerate(spans):
            hidden[at, :count] = self.states[first : first + count]
            mask[at, :count] = 1
        return {"hidden": torch.from_numpy(hidden), "mask": torch.from_numpy(mask), "texts": texts(rows)}


class HeadLearner(nn.Module):
    """The heads of a model with the losses of their tasks, on states that were computed before."""

    def __init__(self, model: Model, tasks: Mapping[str, Learned], outputs: Mapping[str, Outputs]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({module_name(name): model.head(name) for name in tasks})
        self.tasks, self.outputs = tasks, outputs

    def forward(
        self,
        task_name: str,
        hidden: Tensor,
        mask: Tensor,
        texts: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
    ) -> dict[str, Tensor]:
        """The batch's mean loss."""
        task = self.tasks[task_name]
        pooled = hidden[:, 0] if self.outputs[task_name].pooled else None
        logits = cast("Head", self.heads[module_name(task_name)])(TrunkStates(hidden, pooled, mask, texts))
        return {"loss": task.kind.loss(logits.float(), rows, targets, task.options, task.terms)}

    def collate(self, task: str, features: Sequence[Feature]) -> dict[str, Any]:
        """A batch for `forward`."""
        found = self.outputs[task].of([row for rows, _ in features for row in rows])
        return {**found, "rows": [rows for rows, _ in features], "targets": [target for _, target in features]}


def check_heads(model: Model) -> None:
    """Raise ConfigError for a task whose head has nothing of its own to train."""
    for name in model.specs:
        if not model.head_tensors(name):
            found = f"tasks.{name}: its head has no weights of its own, as they are the trunk's"
            raise ConfigError(f"{found}; allowed with result: heads are tasks whose heads have some")


def compute_outputs(
    model: Model, task: str, features: Iterable[Feature], *, pad_id: int, trunk: str, folder: Path
) -> Outputs:
    """Outputs for the rows of a task's features, from `folder` where they are there already, else computed and put
    there. `trunk` is its fingerprint."""
    reads = model.head(task).reads
    rows = list({row.key: row for row in chain.from_iterable(rows for rows, _ in features)}.values())
    counts = [len(row) if reads == "all" else 1 for row in rows]
    firsts = np.cumsum([0, *counts]).tolist()
    places = {row.key: (first, count) for row, first, count in zip(rows, firsts, counts, strict=False)}
    path = folder / f"{_digest(rows, reads=reads, trunk=trunk)}.npy"
    shape = firsts[-1], hidden_size(model.trunk.config)
    if not _holds(path, shape):
        _compute(model, rows, firsts, reads=reads, pad_id=pad_id, path=path, shape=shape)
    return Outputs(np.load(path, mmap_mode="r", allow_pickle=False), places, pooled=reads == "pooled")


def _digest(rows: Sequence[Row], *, reads: Reads, trunk: str) -> str:
    digest = hashlib.sha256(f"{trunk} {reads}".encode())
    for row in rows:
        digest.update(len(row).to_bytes(4))
        digest.update(row.ids.tobytes())
        digest.update(row.type_ids.tobytes())
    return digest.hexdigest()[:32]


def _holds(path: Path, shape: tuple[int, int]) -> bool:
    """Whether there is a file of that shape."""
    try:
        return bool(np.load(path, mmap_mode="r", allow_pickle=False).shape == shape)
    except (OSError, ValueError):
        return False


@torch.inference_mode()
def _compute(
    model: Model,
    rows: Sequence[Row],
    firsts: Sequence[int],
    *,
    reads: Reads,
    pad_id: int,
    path: Path,
    shape: tuple[int, int],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = shape[0] * shape[1] * 4
    if size > _SAID:
        sys.stderr.write(f"trunk outputs of {len(rows):,} rows: {size / 2**20:,.0f} MiB in {path}\n")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.trunk.eval().to(device)
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        kept = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
        for indexes in plan([len(row) for row in rows], budget=_BUDGET, cost=padded_cost):
            states = model.states(*(part.to(device) for part in padded([rows[at] for at in indexes], pad_id=pad_id)))
            for number, at in enumerate(indexes):
                kept[firsts[at] : firsts[at + 1]] = _read(states, number, len(rows[at]), reads)
        kept.flush()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        model.trunk.to("cpu")


def _read(states: TrunkStates, number: int, length: int, reads: Reads) -> np.ndarray:
    """(positions, hidden) of one row."""
    if reads == "pooled":
        assert states.pooled is not None
        found = states.pooled[number][None]
    else:
        span = {"all": slice(length), "first": slice(1), "last": slice(length - 1, length)}[reads]
        found = states.hidden[number, span]
    return np.asarray(found.float().cpu().numpy())
