"""A device that is not the host's, without one: on `meta`, whatever mixes memory of both sides or reads back raises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mtserve.backends import flat
from mtserve.backends.eager import EagerBackend
from mtserve.backends.graphs import Graphs
from mtserve.backends.staging import Lane
from mtserve.batching import Batch
from mtserve.rows import Past
from tests.test_graphs import RECORDED, lines_of, on_cpu
from tests.test_pasts import row, words
from tests.test_serving import LENGTHS, rows_of
from tests.tiny import FAMILIES, PAD, Tiny, tiny

FAR = torch.device("meta")
READS = {"gpt2", "deberta-v2", "mpnet"}
"""Families whose pass asks its device: whether there are types beside 0, or where the padding is."""


class FarLane(Lane):
    def fetched(self, tensor: Tensor) -> Tensor:
        assert tensor.device == FAR
        return torch.zeros(tensor.shape)


def far(family: str) -> tuple[Tiny, EagerBackend]:
    """A backend that was proven on the host, moved to where nothing can be read."""
    small = tiny(family)
    backend = EagerBackend(small.model, pad_id=PAD, follow=True)
    assert backend.served.flat
    keeps = backend.keeps
    backend.served.trunk.to(FAR)
    backend.served.device = FAR
    small.model.to(FAR)
    backend.__dict__ |= {"lane": FarLane(FAR), "keeps": keeps}
    return small, backend


@pytest.fixture(autouse=True)
def _without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers makes no masks for an attention that has no function for them."""
    monkeypatch.setattr(flat, "register", lambda: AttentionInterface.register(flat.NAME, flat.attend))
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, flat.NAME, raising=False)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - READS))
def test_all_that_a_launch_computes_lies_on_the_device(family: str) -> None:
    small, backend = far(family)
    for rows in (rows_of(LENGTHS, types=True), rows_of((8,)), rows_of((90, 60, 60))):
        batch = Batch(tuple(rows), {task.name: tuple(range(len(rows))) for task in small.tasks})
        found = backend.run(batch)
        assert {task: len(arrays) for task, arrays in found.items()} == dict.fromkeys(found, len(rows))


def test_so_does_all_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pasts of different lengths, from forks, and from beginnings that rows share."""
    monkeypatch.setattr("mtserve.backends.eager._WORTH_SHARING", 25)
    _, backend = far("llama")
    assert backend.keeps
    rows = [one.extended([], past=Past()) for one in rows_of((5, 9, 2))]
    choices = [row([*words(25), *words(size, size)], shared=25) for size in (2, 3)]
    for step in range(3):
        before = backend.tokens
        wanted = {"forth": tuple(range(len(rows))), "topic": (len(rows), len(rows) + 1)}
        backend.run(Batch((*rows, *choices), wanted))
        assert backend.tokens - before == (16 if step == 0 else sum(1 + (at == step - 1) for at in range(3))) + 25 + 5
        rows = [one.extended([7] * (1 + (at == step)), past=one.past) for at, one in enumerate(rows)]
    assert rows[0].past is not None
    forks = [replace(rows[0], past=rows[0].past.fork()) for _ in range(2)]
    backend.run(Batch((*forks, *rows), {"forth": (0, 1, 2)}))
    del forks, rows[1]
    backend.release()


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("family", [*RECORDED, "llama"])
def test_so_does_what_is_recorded(family: str, varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(query: Tensor, _: Tensor, __: Tensor, limits: Tensor, *___: object, **____: object) -> Tensor:
        assert (limits.device, limits.dtype) == (FAR, torch.int32)
        return torch.empty_like(query)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    _, backend = far(family)
    made = Graphs(backend.served, on_cpu, varlen=varlen)
    with torch.inference_mode():
        for lengths in ((12, 3), (9,), (20, 9, 7)):
            lines, counts = lines_of(backend, rows_of(lengths))
            hidden = made(lines, counts)
            assert hidden is not None
            assert (hidden.device, len(hidden)) == (FAR, int(np.sum(lengths)))
    assert all(one is not None for one in made.recorded.values())
