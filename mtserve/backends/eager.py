"""The torch backend: rows end to end, one trunk pass, each head on the positions that it reads.

Where a family's attention cannot keep rows apart, they are padded at the right instead (`serving` finds out).

A batch is one pass, or two: rows whose first tokens are known (from a past, or from a beginning that several rows
share and that the first pass encoded once) are computed from there on. A head that reads more than a row's last
positions has its rows computed whole.

On a GPU a launch enqueues all of that, with the copies of the logits behind it, and returns; only logits come back, of
the positions that were asked for. Nothing on the way waits for the device where the trunk takes rows end to end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch

from mtserve.backends import hardware
from mtserve.backends.base import Answers, Times
from mtserve.backends.graphs import Graphs, graphs_of
from mtserve.backends.launched import Launched, Logits
from mtserve.backends.outputs import Outputs
from mtserve.backends.passes import Kept, Passes
from mtserve.backends.pasts import Pasts, reach
from mtserve.backends.proof import Proof
from mtserve.backends.serving import Served
from mtserve.backends.staging import Lane
from mtserve.batching import Batch, Cost, padded_cost, real_cost
from mtserve.head_file import HeadFile
from mtserve.heads import FlatStates
from mtserve.model import Model
from mtserve.profiles import Hardware
from mtserve.rows import Past, Row, make_row
from mtserve.trunk import is_causal
from mtserve.weights import add_sent_head

logger = logging.getLogger(__name__)

_MOST_SHARED = 32_768  # tokens of the buffers while beginnings are shared; a larger batch is computed whole
_WORTH_SHARING = 100  # tokens saved in a batch; for fewer, a second pass costs more (docs/benchmarks.md)


class EagerBackend:
    """Runs a `Model` in PyTorch's eager mode. `follow` is for a model in training: its weights are used where they are,
    in their own precision, so that they may change between two runs. `capture` makes the trunk's pass a graph (see
    `captured`): seconds once, for less overhead in every pass; `graphs` does so on a GPU, for passes over few tokens
    (see `graphs`). Of rows of one pass, `keep_bytes` of the trunk's outputs are kept."""

    def __init__(
        self,
        model: Model,
        *,
        pad_id: int,
        profile: str = "fp32",
        follow: bool = False,
        capture: bool = False,
        graphs: bool = False,
        keep_bytes: int = 0,
    ) -> None:
        self.model = model
        self.pad_id = pad_id
        self.profile = profile
        self.tokens = 0
        self._follow = follow
        self.capture = capture
        self._with_graphs = graphs and not follow
        self.pasts = Pasts()
        self.outputs: Outputs[Kept] | None = Outputs(keep_bytes) if keep_bytes else None
        self._reach = reach(model.trunk.config)

    @cached_property
    def served(self) -> Served:
        """The model as it computes; made when it is first asked for, on the device where the model is then."""
        return Served(self.model, self.profile, follow=self._follow, capture=self.capture)

    @cached_property
    def lane(self) -> Lane:
        return Lane(self.model.trunk.device)

    @cached_property
    def graphs(self) -> Graphs | None:
        """Recorded passes over few tokens, where they were asked for and could be made."""
        if not self._with_graphs:
            return None
        with self._evaluating():
            return graphs_of(self.served, Proof(self.model))

    @cached_property
    def _passes(self) -> Passes:
        return Passes(self.served, self.graphs if self.served.flat else None, pad_id=self.pad_id)

    @property
    def kept_bytes(self) -> int:
        return 0 if self.outputs is None else self.outputs.size

    @property
    def hardware(self) -> Hardware:
        return hardware.hardware("cuda" if self.served.device.type == "cuda" else "cpu")

    @property
    def padding_free(self) -> bool:
        return self.served.flat

    @property
    def cost(self) -> Cost:
        return real_cost if self.served.flat else padded_cost

    def run(self, batch: Batch) -> Answers:
        return self.launch(batch).result()

    def launch(self, batch: Batch) -> Launched:
        if self.lane.device != self.model.trunk.device:  # a training moves its model after this was made
            for made in ("served", "lane", "graphs", "_passes"):
                self.__dict__.pop(made, None)
            self._forget()
        with self._evaluating():
            return self._launch(batch)

    def release(self) -> None:
        with torch.inference_mode(), self.lane.entered():
            self.pasts.slots.admit([])

    def add(self, key: str, head: HeadFile) -> None:
        add_sent_head(self.model, key, head)
        with self._evaluating():
            self.served.head(key)

    def remove(self, key: str) -> None:
        self.served.forget(key)
        self.model.remove(key)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        if training:  # switching modes visits every module, which would cost a short request a tenth
            self.model.eval()
        try:
            with torch.inference_mode(), self.lane.entered():
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
            if off <= max(1e-4, 8 * torch.finfo(self.served.dtype).eps):
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
        whole = self._computed(rows, [0] * len(rows))
        rows = [replace(row, past=Past()) for row in rows]
        parts = [row.begun(known, row.past) for row, (_, known) in zip(rows, sizes, strict=True)]
        self.pasts.slots.admit(rows)
        self._computed(parts, [0] * len(rows))
        later = self._computed(rows, [known for _, known in sizes])
        ends = whole.starts + whole.counts
        pairs = [
            (later.hidden[start : start + n - known], whole.hidden[end - n + known : end])
            for (n, known), start, end in zip(sizes, later.starts, ends, strict=True)
        ]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def _launch(self, batch: Batch) -> Launched:
        rows = [self._kept(row) for row in batch.rows]
        kept = [row for row in rows if row.past is not None]
        reads = {task: self.served.head(task).reads for task in batch.wanted}
        entire = {at for task, some in batch.wanted.items() if reads[task] != "last" for at in some}
        pooled = "pooled" in reads.values()
        reused = self._reused(batch, rows)
        groups = self._groups({at: row for at, row in enumerate(rows) if at not in entire and at not in reused})
        beginnings = [rows[group[0]].begun(rows[group[0]].shared, Past()) for group in groups]
        self.pasts.slots.admit([row for row in (*rows, *beginnings) if row.past is not None])
        known = {
            at: self.pasts.slots.known(row) for at, row in enumerate(rows) if row.past is not None and at not in entire
        }
        for group, beginning in zip(groups, beginnings, strict=True):
            assert beginning.past is not None
            beginning.past.length = len(beginning)
            for at in group:
                rows[at] = replace(rows[at], past=beginning.past.fork())
                known[at] = len(beginning)
        logits: list[Logits] = []
        times = Times()
        fresh = [at for at in range(len(rows)) if not known.get(at) and at not in reused]
        if reused:
            began = time.perf_counter()
            states = self._passes.joined([*reused.values()], pooled=pooled)
            logits += self._answers(batch, {at: rows[at] for at in reused}, states)
            times.reused, times.head_s = len(reused), time.perf_counter() - began
        if fresh or beginnings:
            some = {at: rows[at] for at in fresh}
            first = [0] * (len(some) + len(beginnings))
            logits += self._passed(batch, some, [*some.values(), *beginnings], first, times, pooled=pooled)
        if going_on := [at for at in known if known[at]]:
            if groups:
                self.pasts.slots.admit([rows[at] for at in going_on])
            going_on.sort(key=lambda at: self.pasts.slots.slot(rows[at]))
            some = {at: rows[at] for at in going_on}
            logits += self._passed(batch, some, [*some.values()], [known[at] for at in going_on], times)
        tokens = sum(len(row) for at, row in enumerate(rows) if at not in reused)
        tokens += sum(map(len, beginnings)) - sum(known.values())
        taken = partial(self._count, tokens)
        return Launched(batch, kept, logits, self.lane, self.lane.mark(), taken, self._forget, times)

    def _passed(
        self,
        batch: Batch,
        some: Mapping[int, Row],
        rows: Sequence[Row],
        known: Sequence[int],
        times: Times,
        *,
        pooled: bool = False,
    ) -> list[Logits]:
        """A trunk pass over rows, of which the first are `some` of the batch's by index, and the heads on those."""
        began = time.perf_counter()
        states = self._computed(rows, known, pooled=pooled)
        self._keep(batch, some, states)
        computed = time.perf_counter()
        logits = list(self._answers(batch, some, states))
        times.trunk_s += computed - began
        times.head_s += time.perf_counter() - computed
        return logits

    def _reused(self, batch: Batch, rows: Sequence[Row]) -> dict[int, Kept]:
        """What is kept of rows of the batch, by their indexes."""
        if self.outputs is None:
            return {}
        asked = {at: row for at, row in enumerate(rows) if row.past is None and at not in batch.private}
        found = {at: self.outputs.get(row.key) for at, row in asked.items()}
        return {at: kept for at, kept in found.items() if kept is not None}

    def _keep(self, batch: Batch, some: Mapping[int, Row], states: FlatStates) -> None:
        """Keep what the trunk gave for those rows of the batch of which it may be kept."""
        if self.outputs is None:
            return
        for number, (at, row) in enumerate(some.items()):
            if row.past is None and at not in batch.private:
                kept = Kept.of(states, number)
                self.outputs.put(row.key, kept, size=kept.size)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens

    def _forget(self) -> None:
        """Trust nothing that is kept: a pass failed on the way, and what it wrote is unknown."""
        self.pasts = Pasts()
        self.outputs = self.outputs and Outputs(self.outputs.most)

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

    def _computed(self, rows: Sequence[Row], known: Sequence[int], *, pooled: bool = False) -> FlatStates:
        return self._passes.computed(rows, known, self.pasts, pooled=pooled)

    def _answers(self, batch: Batch, rows: Mapping[int, Row], states: FlatStates) -> Iterator[Logits]:
        """Each head on those of these rows that its task wants; `states` are of these rows, in order."""
        place = {at: index for index, at in enumerate(rows)}
        for task, wanted in batch.wanted.items():
            if some := [at for at in wanted if at in place]:
                which = np.array([place[at] for at in some], np.int32)
                answers = np.array([rows[at].answers for at in some], np.int32)
                head = self.served.head(task)
                read = states.read(head, which, answers, [rows[at] for at in some]).to(self.served.head_dtype(task))
                values = self.lane.fetched(head(read).float())  # (rows, n_out), or (rows, 1, n_out) a token
                if head.per_token:
                    counts = states.counts[which] if head.reads == "all" else answers
                    yield Logits(task, some, values[:, 0], counts)
                else:
                    yield Logits(task, some, values, None)
