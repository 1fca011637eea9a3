"""The torch backend: rows padded at the right, one trunk pass, each head on the positions that it reads.

A batch is one pass, or two: rows whose first tokens are known (from a past, or from a beginning that several rows
share and that the first pass encoded once) are computed from there on. A head that reads more than a row's last
positions has its rows computed whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from mtserve.backends.pasts import Pasts, reach
from mtserve.batching import Batch, Cost, padded_cost
from mtserve.heads import TrunkStates
from mtserve.model import Model
from mtserve.rows import Floats, Past, Row, make_row
from mtserve.trunk import is_causal

logger = logging.getLogger(__name__)

_MOST_SHARED = 32_768  # tokens of the buffers while beginnings are shared; a larger batch is computed whole
_WORTH_SHARING = 100  # tokens saved in a batch; for fewer, a second pass costs more (docs/benchmarks.md)


class EagerBackend:
    """Runs a `Model` in PyTorch's eager mode, in the precision of its weights."""

    profile = "fp32"

    def __init__(self, model: Model, *, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id
        self.cost: Cost = padded_cost
        self.tokens = 0
        self.pasts = Pasts()
        self._reach = reach(model.trunk.config)

    def run(self, batch: Batch) -> dict[str, list[Floats]]:
        with self._evaluating():
            return self._run(batch)

    def release(self) -> None:
        self.pasts.admit([])

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        if training:  # switching modes visits every module, which would cost a short request a tenth
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if training:
                self.model.train()

    @cached_property
    def keeps(self) -> bool:
        """Whether pasts are kept: the trunk is causal, and rows that go on were found to equal whole ones."""
        with self._evaluating():
            if not is_causal(self.model.trunk):
                return False
            try:
                off = self._error_of_going_on()
                reason = f"states differ by {off:.1e}"
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                off, reason = np.inf, f"{type(error).__name__}: {error}"
            self.pasts = Pasts()
            if off <= max(1e-4, 8 * torch.finfo(self.model.trunk.dtype).eps):
                return True
        family = self.model.trunk.config.model_type
        logger.warning("%s keeps no keys and values, so every step computes whole rows: %s", family, reason)
        return False

    def _error_of_going_on(self) -> float:
        """Largest relative difference between states of random rows computed whole and in two parts."""
        sizes = ((7, 6), (3, 1), (9, 5))  # tokens of a row, and of its first part
        size = self.model.trunk.config.vocab_size
        random = np.random.default_rng(0)
        rows = [make_row(random.integers(0, size, n), [0] * n, [(0, 0)] * n, [False] * n) for n, _ in sizes]
        whole = self._computed(rows, [0] * len(rows)).hidden
        rows = [replace(row, past=Past()) for row in rows]
        parts = [_beginning(row, known, row.past) for row, (_, known) in zip(rows, sizes, strict=True)]
        self.pasts.admit(rows)
        self._computed(parts, [0] * len(rows))
        later = self._computed(rows, [known for _, known in sizes]).hidden
        pairs = [(later[at, : n - known], whole[at, known:n]) for at, (n, known) in enumerate(sizes)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def _run(self, batch: Batch) -> dict[str, list[Floats]]:
        rows = [self._kept(row) for row in batch.rows]
        entire = {at for task, some in batch.wanted.items() if self.model.head(task).reads != "last" for at in some}
        groups = self._groups({at: row for at, row in enumerate(rows) if at not in entire})
        beginnings = [_beginning(rows[group[0]], rows[group[0]].shared, Past()) for group in groups]
        self.pasts.admit([row for row in (*rows, *beginnings) if row.past is not None])
        known = {at: self.pasts.known(row) for at, row in enumerate(rows) if row.past is not None and at not in entire}
        for group, beginning in zip(groups, beginnings, strict=True):
            assert beginning.past is not None
            beginning.past.length = len(beginning)
            for at in group:
                rows[at] = replace(rows[at], past=beginning.past.fork())
                known[at] = len(beginning)
        logits: dict[str, dict[int, Floats]] = {task: {} for task in batch.wanted}
        fresh = [at for at in range(len(rows)) if not known.get(at)]
        if fresh or beginnings:
            some = {at: rows[at] for at in fresh}
            states = self._computed([*some.values(), *beginnings], [0] * (len(some) + len(beginnings)))
            self._answer(batch, some, states, logits)
        if going_on := [at for at in known if known[at]]:
            if groups:
                self.pasts.admit([rows[at] for at in going_on])
            going_on.sort(key=lambda at: self.pasts.slot(rows[at]))
            some = {at: rows[at] for at in going_on}
            states = self._computed([*some.values()], [known[at] for at in going_on])
            self._answer(batch, some, states, logits)
        self.tokens += sum(map(len, rows)) - sum(known.values()) + sum(map(len, beginnings))
        for row in rows:
            if row.past is not None:
                row.past.length = len(row)
        return {task: [logits[task][at] for at in some] for task, some in batch.wanted.items()}

    def _keeps(self, row: Row) -> bool:
        return len(row) <= self._reach and self.keeps

    def _kept(self, row: Row) -> Row:
        """The row, without its past where that cannot be kept; the engine then plans with all of its tokens."""
        if row.past is None or self._keeps(row):
            return row
        row.past.cut(0)
        return replace(row, past=None)

    def _groups(self, rows: Mapping[int, Row]) -> list[list[int]]:
        """Rows without a past that begin alike, where encoding the beginnings once saves enough."""
        alike: dict[tuple[bytes, bytes], list[int]] = {}
        for at, row in rows.items():
            if row.shared and row.past is None:
                alike.setdefault((row.ids[: row.shared].tobytes(), row.type_ids[: row.shared].tobytes()), []).append(at)
        groups = [group for group in alike.values() if len(group) > 1]
        saved = sum(rows[group[0]].shared * (len(group) - 1) for group in groups)
        forked = [rows[at] for group in groups for at in group]
        if saved < _WORTH_SHARING or not all(map(self._keeps, forked)):
            return []
        longest = max(self.pasts.shape[1], *map(len, forked))
        fits = (self.pasts.shape[0] + len(groups) + len(forked)) * longest <= _MOST_SHARED
        return groups if fits else []

    def _computed(self, rows: Sequence[Row], known: Sequence[int]) -> TrunkStates:
        """One trunk pass over admitted rows, but for their first `known` tokens: (rows, longest rest, hidden)."""
        device = self.model.trunk.device
        ids, mask, type_ids = (tensor.to(device) for tensor in padded(rows, pad_id=self.pad_id, known=known))
        if all(row.past is None for row in rows):
            return self.model.states(ids, mask, type_ids)
        like = torch.empty((), dtype=self.model.trunk.dtype, device=device)
        positions, attention = self.pasts.begin(rows, known, like) or (None, None)
        states = self.model.states(ids, mask, type_ids, cache=self.pasts, positions=positions, attention=attention)
        self.pasts.done(rows)
        return states

    def _answer(
        self, batch: Batch, rows: Mapping[int, Row], states: TrunkStates, logits: Mapping[str, dict[int, Floats]]
    ) -> None:
        """Each head on those of these rows that its task wants; `states` are of these rows, in order."""
        place = {at: index for index, at in enumerate(rows)}
        for task, wanted in batch.wanted.items():
            if some := [at for at in wanted if at in place]:
                which = torch.tensor([place[at] for at in some], device=states.hidden.device)
                answers = self._head(task, states.select(which), [rows[at] for at in some])
                logits[task].update(zip(some, answers, strict=True))

    def _head(self, task: str, states: TrunkStates, rows: Sequence[Row]) -> list[Floats]:
        head = self.model.head(task)
        if head.per_token and head.reads == "last":
            counts = [row.answers for row in rows]
            answers = head(states.answering(torch.tensor(counts, device=states.hidden.device)))[:, 0]
            parts = np.split(answers.float().cpu().numpy(), np.cumsum(counts)[:-1])
            return [part.copy() for part in parts]  # a view would keep the logits of all rows alive with one work
        logits = head(states.gathered(head.reads)).float().cpu().numpy()  # (rows, n_out) or (rows, seq, n_out)
        if head.reads == "all" and head.per_token:
            return [array[: len(row)] for array, row in zip(logits, rows, strict=True)]
        return list(logits[:, 0] if head.per_token else logits)


def _beginning(row: Row, length: int, past: Past | None) -> Row:
    """The first tokens of a row, as a row with a past of its own."""
    return replace(
        make_row(row.ids[:length], row.type_ids[:length], row.offsets[:length], row.special[:length]), past=past
    )


def padded(
    rows: Sequence[Row], *, pad_id: int, known: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows without their first `known` tokens: ids, mask and type ids, each (rows, seq) int64, padded at the right."""
    first = known or [0] * len(rows)
    sizes = [len(row) - start for row, start in zip(rows, first, strict=True)]
    shape = (len(rows), max(sizes))
    ids, mask, type_ids = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for at, (row, start, size) in enumerate(zip(rows, first, sizes, strict=True)):
        ids[at, :size], mask[at, :size], type_ids[at, :size] = row.ids[start:], 1, row.type_ids[start:]
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(type_ids)
