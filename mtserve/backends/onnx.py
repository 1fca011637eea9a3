"""The ONNX backend: a bundle's trunk over padded rows, each head on the positions that it reads. No torch.

Rows of a pass are padded at the right to the longest. Rows that go on from a past make a pass of their own, which is
given keys and values of what they know and gives those of the new tokens. A head that reads more than a row's last
positions has its rows computed whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mtserve.backends.base import Answers, Done, Times
from mtserve.backends.kept import Kept
from mtserve.backends.outputs import Outputs
from mtserve.backends.sessions import Graphs
from mtserve.backends.slots import Steps
from mtserve.batching import Batch, Cost, padded_cost
from mtserve.bundle import HeadGraph
from mtserve.errors import CheckpointError
from mtserve.head_file import HeadFile
from mtserve.profiles import Hardware
from mtserve.rows import Floats, Row, spans, texts_of

_Kept = dict[str, npt.NDArray[Any]]
"""Of one row: `hidden` (len, hidden), and `pooled` (hidden,) where the trunk has a pooler."""


@dataclass(frozen=True)
class _States:
    """What the trunk computed for some rows: outputs by name, as the runtime has them; `counts` tokens of each row in
    a rectangle of `seq` columns."""

    found: Mapping[str, Any]
    counts: npt.NDArray[np.int64]
    seq: int


class OnnxBackend:
    """Runs the graphs of a bundle. `pad_id` stands where a row is shorter than the longest. Of rows of one pass,
    `keep_bytes` of the trunk's outputs are kept."""

    def __init__(self, graphs: Graphs, *, pad_id: int, keep_bytes: int = 0) -> None:
        self.graphs = graphs
        self.pad_id = pad_id
        self.profile = graphs.exported.profile
        self.tokens = 0
        self.outputs: Outputs[_Kept] | None = Outputs(keep_bytes) if keep_bytes else None
        self.padding_free = False
        trunk = graphs.exported.trunk
        self.keeps = trunk.cache is not None
        self._trunk = trunk
        self._forget()

    @property
    def kept_bytes(self) -> int:
        return 0 if self.outputs is None else self.outputs.size

    @property
    def cost(self) -> Cost:
        return padded_cost

    @property
    def hardware(self) -> Hardware:
        return Hardware(self.graphs.device)

    def add(self, key: str, head: HeadFile) -> None:
        raise CheckpointError("the trunk is served from a bundle, which takes no heads")

    def remove(self, key: str) -> None:
        """None was added."""

    def launch(self, batch: Batch) -> Done:
        try:
            return self._computed(batch)
        except BaseException:
            self._forget()  # what is kept may be half written
            raise

    def run(self, batch: Batch) -> Answers:
        return self.launch(batch).result()

    def release(self) -> None:
        if self.kept is not None:
            self.kept.slots.admit([])

    def _forget(self) -> None:
        self.kept = None if self._trunk.cache is None else Kept(self._trunk.cache)

    def _computed(self, batch: Batch) -> Done:
        rows = [self._kept(row) for row in batch.rows]
        heads = self.graphs.exported.heads
        entire = {at for task, some in batch.wanted.items() if heads[task].reads != "last" for at in some}
        asked = {at: row for at, row in enumerate(rows) if row.past is None and at not in batch.private}
        reused = {} if self.outputs is None else _found(self.outputs, asked)
        known = {at: 0 for at in range(len(rows)) if at not in reused}
        if self.kept is not None:
            self.kept.slots.admit([row for row in rows if row.past is not None])
            for at, row in enumerate(rows):
                if row.past is not None and at not in entire:
                    known[at] = self.kept.slots.known(row)
        answers: dict[str, dict[int, Floats]] = {task: {} for task in batch.wanted}
        times = Times(reused=len(reused))
        if reused:
            began = time.perf_counter()
            self._answer(batch, [*reused], rows, _joined([*reused.values()]), answers)
            times.head_s += time.perf_counter() - began
        going_on = [at for at in known if known[at]]
        if self.kept is not None:
            going_on.sort(key=lambda at: self._slot(rows[at]))
        for some in ([at for at in known if not known[at]], going_on):
            if some:
                began = time.perf_counter()
                states = self._passed([rows[at] for at in some], [known[at] for at in some])
                self._keep(some, asked, states)
                computed = time.perf_counter()
                self._answer(batch, some, rows, states, answers)
                times.trunk_s += computed - began
                times.head_s += time.perf_counter() - computed
        for row in rows:
            if row.past is not None and self.keeps:
                row.past.length = len(row)
        self.tokens += sum(len(rows[at]) - tokens for at, tokens in known.items())
        return Done({task: [answers[task][at] for at in some] for task, some in batch.wanted.items()}, times)

    def _kept(self, row: Row) -> Row:
        """The row, without its past where that cannot be kept; the engine then plans with all of its tokens."""
        if row.past is None or not self.keeps:
            return row
        if self._trunk.reach is None or len(row) <= self._trunk.reach:
            return row
        row.past.cut(0)
        return replace(row, past=None)

    def _keep(self, some: Sequence[int], asked: Mapping[int, Row], states: _States) -> None:
        """Keep what the trunk gave for those of some rows of which it may be kept; copied, since a part of it would
        keep all."""
        if self.outputs is None:
            return
        for number, at in enumerate(some):
            if at in asked:
                kept = {"hidden": states.found["hidden"][number, : states.counts[number]].copy()}
                if "pooled" in states.found:
                    kept["pooled"] = states.found["pooled"][number].copy()
                self.outputs.put(asked[at].key, kept, size=sum(part.nbytes for part in kept.values()))

    def _slot(self, row: Row) -> int:
        assert self.kept is not None
        return self.kept.slots.slot(row)

    def _passed(self, rows: Sequence[Row], known: Sequence[int]) -> _States:
        """One trunk pass over rows, but for their first `known` tokens."""
        counts = np.array([len(row) - start for row, start in zip(rows, known, strict=True)], np.int64)
        shape = len(rows), int(counts.max())
        ids, type_ids, mask = (
            np.full(shape, self.pad_id, np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
        )
        for at, (row, start, count) in enumerate(zip(rows, known, counts, strict=True)):
            ids[at, :count], type_ids[at, :count], mask[at, :count] = row.ids[start:], row.type_ids[start:], 1
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": type_ids}
        steps: Steps | None = None
        new = [name for name in self._trunk.outputs if name.startswith("new_")]
        if self.kept is not None:
            steps = self.kept.slots.begin(rows, known)
            feeds["attention_mask"], layers = self.kept.given(steps)
            feeds["position_ids"] = steps.positions.astype(np.int64)
            feeds |= dict(zip((name.replace("new_", "known_") for name in new), layers, strict=True))
        feeds = {name: feeds[name] for name in self._trunk.inputs}
        found = self.graphs.states(self._trunk.outputs, feeds, kept=new)
        if self.kept is not None and steps is not None and steps.new.any():
            self.kept.taken(steps, [found[name] for name in new])
            self.kept.slots.done(rows)
        return _States(found, counts, shape[1])

    def _answer(
        self,
        batch: Batch,
        some: Sequence[int],
        rows: Sequence[Row],
        states: _States,
        into: Mapping[str, dict[int, Floats]],
    ) -> None:
        """Each head on those of these rows that its task wants; `states` are of these rows, in order."""
        place = {at: index for index, at in enumerate(some)}
        for task, wanted in batch.wanted.items():
            if mine := [at for at in wanted if at in place]:
                head = self.graphs.exported.heads[task]
                which = np.array([place[at] for at in mine], np.int64)
                of = [rows[at] for at in mine]
                feeds, sizes = _feeds(head, which, of, states)
                logits = np.asarray(self.graphs.logits(task, feeds), np.float32)
                each = [*logits] if sizes is None else np.split(logits, np.cumsum(sizes)[:-1])
                into[task].update(zip(mine, each, strict=True))


def _found(outputs: Outputs[_Kept], rows: Mapping[int, Row]) -> dict[int, _Kept]:
    """What is kept of rows, by their indexes."""
    found = {at: outputs.get(row.key) for at, row in rows.items()}
    return {at: kept for at, kept in found.items() if kept is not None}


def _joined(kept: Sequence[_Kept]) -> _States:
    """Outputs of rows that were kept, as a pass over them gives them."""
    counts = np.array([len(one["hidden"]) for one in kept], np.int64)
    first = kept[0]["hidden"]
    hidden = np.zeros((len(kept), int(counts.max()), first.shape[1]), first.dtype)  # (rows, seq, hidden)
    for row, one in zip(hidden, kept, strict=True):
        row[: len(one["hidden"])] = one["hidden"]
    others = {name: np.stack([one[name] for one in kept]) for name in kept[0] if name != "hidden"}
    return _States({"hidden": hidden, **others}, counts, hidden.shape[1])


def _feeds(
    head: HeadGraph, which: npt.NDArray[np.int64], rows: Sequence[Row], states: _States
) -> tuple[dict[str, Any], npt.NDArray[np.int64] | None]:
    """What a head is given for some of the rows, and how many of its answers belong to each; None: one."""
    if head.takes == "pooled":
        return {"pooled": states.found["pooled"], "at": which}, None
    hidden, counts, starts = states.found["hidden"], states.counts[which], which * states.seq
    if head.takes == "rows":
        mask = (np.arange(states.seq) < counts[:, None]).astype(np.int64)
        feeds = {"hidden": hidden, "at": which, "mask": mask}
        if "texts" in head.inputs:
            texts = texts_of(rows)
            feeds["texts"] = np.pad(texts, ((0, 0), (0, states.seq - texts.shape[1]))).astype(np.int64)
        return feeds, None
    if head.reads == "last" and head.per_token:
        answers = np.array([row.answers for row in rows], np.int64)
        return {"hidden": hidden, "at": spans(starts + counts - answers, answers)}, answers
    if head.reads == "all":
        return {"hidden": hidden, "at": spans(starts, counts)}, counts
    return {"hidden": hidden, "at": starts + counts - 1 if head.reads == "last" else starts}, None
