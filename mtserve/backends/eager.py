"""The torch backend: rows padded at the right, one trunk pass, each head on the positions that it reads."""

from __future__ import annotations

import numpy as np
import torch

from mtserve.batching import Batch, Cost, padded_cost
from mtserve.heads import TrunkStates
from mtserve.model import Model
from mtserve.rows import Floats, Row


class EagerBackend:
    """Runs a `Model` in PyTorch's eager mode, in the precision of its weights."""

    profile = "fp32"

    def __init__(self, model: Model, *, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id
        self.cost: Cost = padded_cost

    def run(self, batch: Batch) -> dict[str, list[Floats]]:
        if not self.model.training:  # switching modes visits every module, which would cost a short request a tenth
            return self._run(batch)
        self.model.eval()
        try:
            return self._run(batch)
        finally:
            self.model.train()

    @torch.inference_mode()
    def _run(self, batch: Batch) -> dict[str, list[Floats]]:
        device = self.model.trunk.device
        ids, mask, type_ids = (tensor.to(device) for tensor in padded(batch.rows, pad_id=self.pad_id))
        states = self.model.states(ids, mask, type_ids)
        return {task: self._head(task, wanted, states, batch) for task, wanted in batch.wanted.items()}

    def _head(self, task: str, wanted: tuple[int, ...], states: TrunkStates, batch: Batch) -> list[Floats]:
        head = self.model.head(task)
        mine = states.select(torch.tensor(wanted, device=states.hidden.device)).gathered(head.reads)
        logits = head(mine).float().cpu().numpy()  # (rows, n_out) or (rows, seq, n_out)
        if head.reads == "all" and head.per_token:
            return [logits[at, : len(batch.rows[row])] for at, row in enumerate(wanted)]
        return list(logits[:, 0] if head.per_token else logits)


def padded(rows: tuple[Row, ...] | list[Row], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as ids, mask and type ids, each (rows, seq) int64, padded at the right to the longest."""
    shape = (len(rows), max(map(len, rows)))
    ids, mask, type_ids = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)], type_ids[at, : len(row)] = row.ids, 1, row.type_ids
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(type_ids)
