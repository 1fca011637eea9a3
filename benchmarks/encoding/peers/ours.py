"""mtserve's own engine below its heads: rows, planned into batches by the backend's cost, to mean-pooled embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mtserve
from benchmarks.encoding.peers import batching
from benchmarks.encoding.peers.base import Peer
from mtserve.batching import Batch, plan
from mtserve.engine import DEFAULT_BUDGET, Engine
from mtserve.rows import Row, make_row
from mtserve.text import Limits

TASK = "embed"
"""The task of the benchmark's checkpoint whose head is the mean of a row's states."""


def open_engine(folder: Path, profile: str) -> Engine:
    """The one place where the profile is chosen: any that this machine can run, accepted by the checkpoint or not.

    Raises CheckpointError or ConfigError for one that it cannot.
    """
    return mtserve.load(folder, profile=profile, device="cpu", accepted_only=False, capture=True)


def encode_rows(engine: Engine, rows: Sequence[Row], *, budget: int) -> batching.Floats:
    """(rows, hidden) in order."""
    made: dict[int, Any] = {}
    for batch in plan([len(row) for row in rows], budget=budget, cost=engine.backend.cost):
        wanted = {TASK: tuple(range(len(batch)))}
        made.update(zip(batch, engine.backend.run(Batch(tuple(rows[at] for at in batch), wanted))[TASK], strict=True))
    return np.stack([made[at] for at in range(len(rows))])


class Ours(Peer):
    """Texts are encoded by the checkpoint's tokenizer first. The budget is the default of a server."""

    def __init__(self, folder: Path, *, threads: int, precision: str) -> None:
        torch.set_num_threads(threads)
        self._engine = open_engine(folder / "checkpoint", precision)
        self._budget = DEFAULT_BUDGET
        self.versions = {name: version(name) for name in ("mtserve", "torch", "transformers", "tokenizers")}

    def use(self, setting: Mapping[str, Any]) -> None:
        self._budget = setting.get("tokens", DEFAULT_BUDGET)

    def prepare(self, inputs: Sequence[Any]) -> Any:
        """Ids become rows, the form in which the engine takes them; texts stay texts."""
        return inputs if isinstance(inputs[0], str) else [_row(*one) for one in inputs]

    def encode(self, inputs: Sequence[Row] | Sequence[str]) -> batching.Floats:
        text = self._engine.text.ahead([one for one in inputs if isinstance(one, str)])
        limits = Limits(max_length=256)
        rows = [one if isinstance(one, Row) else text.rows(one, limits=limits)[0] for one in inputs]
        return encode_rows(self._engine, rows, budget=self._budget)


def _row(ids: batching.Ints, types: batching.Ints) -> Row:
    return make_row(ids, types, np.zeros((len(ids), 2)), np.zeros(len(ids), np.bool_))


open_peer = Ours
