"""Recorded passes without a GPU: buckets, what fills them, and that recorded memory is read and written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mtserve.backends import flat, graphs
from mtserve.backends.eager import EagerBackend
from mtserve.backends.graphs import Bucket, Graphs, Numbered, bucket, graphs_of
from mtserve.backends.staging import staged
from mtserve.batching import Batch
from mtserve.engine import Engine
from mtserve.rows import Past, Row
from tests.test_engine_ahead import assert_near
from tests.test_serving import LENGTHS, alone, model_of, rows_of, states, worst
from tests.tiny import PAD, tiny

RECORDED = ["albert", "bert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta"]


def on_cpu(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """As a GPU records: what is repeated reads the memory of the recording, and writes where it wrote then."""
    hidden = run().clone()
    return lambda: hidden.copy_(run()), hidden


def by_hand(q: Tensor, k: Tensor, v: Tensor, limits: Tensor, _: Tensor, longest: int, *__: int, **how: Any) -> Tensor:
    """What the kernel for rows of different lengths computes, (tokens, heads, dim), row by row."""
    left, right = how["window_size"]
    assert how.get("enable_gqa") or q.shape[1] == k.shape[1]
    out = torch.full_like(q, torch.nan)
    for first, last in zip(limits.tolist(), limits.tolist()[1:], strict=False):
        assert first <= last
        assert last - first <= longest
        away = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (away <= left if left >= 0 else away > -(10**6)) & (-away <= right if right >= 0 else away < 10**6)
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
        parts = [of[first:last].transpose(0, 1)[None] for of in (q, k, v)]
        made = scaled_dot_product_attention(*parts, mask, scale=how["scale"], enable_gqa=True)
        out[first:last] = made[0].transpose(0, 1)
    return out


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_hand)


def lines_of(backend: EagerBackend, rows: list[Row]) -> tuple[Tensor, list[int]]:
    first = backend.served.first_position
    each = (
        [r.ids for r in rows],
        [r.type_ids for r in rows],
        [np.arange(len(r), dtype=np.int32) + first for r in rows],
    )
    return staged(each, device=torch.device("cpu")), [len(r) for r in rows]


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([1], Bucket(16, 4)),
        ([16], Bucket(16, 4)),
        ([10, 7], Bucket(24, 4)),
        ([25], Bucket(32, 4)),
        ([10] * 3, Bucket(32, 4)),
        ([8] * 4, Bucket(32, 16)),
        ([100], Bucket(128, 4)),
        ([96], Bucket(96, 4)),
        ([385], Bucket(512, 4)),
        ([2] * 255, Bucket(512, 256)),
        ([1] * 256, None),
        ([513], None),
    ],
)
def test_buckets(lengths: list[int], wanted: Bucket | None) -> None:
    assert bucket(lengths, most_tokens=512) == wanted


def test_buckets_are_few_and_waste_at_most_half() -> None:
    found = {total: bucket([total], most_tokens=512) for total in range(16, 513)}
    sizes = sorted({size.tokens for size in found.values() if size})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(size and total <= size.tokens <= 1.5 * total for total, size in found.items())
    assert all(size % 8 == 0 for size in sizes)  # a mask of other sizes has no fast kernel


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [9, 9, 3, 2, 2], [70, 60, 1]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.usefixtures("kernel")
def test_layouts_of_graphs_attend_as_others_do(lengths: list[int], causal: bool, window: int | None) -> None:
    torch.manual_seed(1)
    tokens = sum(lengths)
    q, k, v = torch.randn(4, tokens, 8), torch.randn(2, tokens, 8), torch.randn(2, tokens, 8)
    wanted = flat.fresh(lengths).attend(q, k, v, scale=0.3, causal=causal, window=window)
    numbers = Numbered(torch.repeat_interleave(torch.tensor(lengths)).int())
    limits = flat.Varlen(torch.tensor([0, *np.cumsum(lengths), tokens, tokens], dtype=torch.int32), tokens)
    for layout in (numbers, limits):
        found = layout.attend(q, k, v, scale=0.3, causal=causal, window=window)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("family", RECORDED)
@pytest.mark.usefixtures("kernel")
def test_a_graph_is_repeated_with_other_rows(family: str, varlen: bool) -> None:
    """One bucket, many batches: neither the rows of the recording nor those of the last batch are seen."""
    model = model_of(family)
    backend = EagerBackend(model, pad_id=PAD)
    made = Graphs(backend.served, on_cpu, varlen=varlen)
    with torch.inference_mode():
        for lengths in ([20, 9], [31], [9, 9, 9], [1], [25], [11, 7, 7]):
            rows = rows_of(tuple(lengths), types=True)
            found = made(*lines_of(backend, rows))
            assert found is not None
            wanted = torch.cat(alone(model, rows)[: len(rows)])
            torch.testing.assert_close(found, wanted, atol=1e-5 * max(1, float(wanted.abs().max())), rtol=2e-5)
    assert {size.tokens for size in made.recorded} == {16, 32}


def test_what_a_graph_gave_is_kept_when_it_is_repeated() -> None:
    backend = EagerBackend(model_of("bert"), pad_id=PAD)
    made = Graphs(backend.served, on_cpu, varlen=False)
    with torch.inference_mode():
        one = made(*lines_of(backend, rows_of((12,))))
        assert one is not None
        before = one.clone()
        made(*lines_of(backend, rows_of((9,))))
    assert torch.equal(one, before)


def with_graphs(monkeypatch: pytest.MonkeyPatch, model: Any, record: Any = on_cpu) -> EagerBackend:
    monkeypatch.setattr("mtserve.backends.eager.graphs_of", partial(graphs_of, record=record))
    return EagerBackend(model, pad_id=PAD, graphs=True)


def test_a_backend_with_graphs_answers_as_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny("bert")
    backend = with_graphs(monkeypatch, small.model)
    engine = Engine(small.tasks, backend, small.text)
    for task in small.tasks:
        sample = task.kind.sample(task.options)
        assert_near(engine.predict(task.name, [sample]), small.engine.predict(task.name, [sample]))
    assert backend.graphs is not None
    rows = rows_of(LENGTHS)
    assert worst(states(backend, rows), alone(small.model, rows)) < 1e-5
    assert len(backend.graphs.recorded) > 1


def test_rows_that_go_on_take_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "register", lambda: AttentionInterface.register(flat.NAME, flat.attend))
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, flat.NAME, raising=False)
    small = tiny("llama")
    backend = with_graphs(monkeypatch, small.model)
    engine = Engine(small.tasks, backend, small.text)
    for task in ("topic", "forth"):
        assert_near(engine.predict(task, ["one", "the parcel"]), small.engine.predict(task, ["one", "the parcel"]))
    assert backend.graphs is not None
    repeated = []
    monkeypatch.setattr(Graphs, "__call__", lambda *of: repeated.append(of))
    with_past = rows_of((9,))[0].extended([], past=Past())
    backend.run(Batch((with_past,), {"forth": (0,)}))
    backend.run(Batch((with_past.extended([7], past=with_past.past),), {"forth": (0,)}))
    assert repeated == []


def test_graphs_that_give_something_else_are_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A recording that goes on reading the rows that it was made of."""

    def stuck(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        hidden = run().clone()
        return lambda: hidden.roll(1, 0), hidden.roll(1, 0)

    backend = with_graphs(monkeypatch, model_of("bert"), stuck)
    with caplog.at_level(logging.WARNING, "mtserve.backends.graphs"):
        assert backend.graphs is None
    assert "bert has no CUDA graphs: states differ by" in caplog.text
    rows = rows_of(LENGTHS)
    assert worst(states(backend, rows), alone(backend.model, rows)) < 1e-5


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mpnet", "its rows are padded"), ("gpt2", "its pass depends on what the type ids are")],
)
def test_families_without_graphs_are_said_so(
    family: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = with_graphs(monkeypatch, model_of(family))
    with caplog.at_level(logging.WARNING, "mtserve.backends.graphs"):
        states(backend, rows_of((3, 4)))
        assert backend.graphs is None
    assert f"{family} has no CUDA graphs: {reason}" in caplog.text


def test_without_a_gpu_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    backend = EagerBackend(model_of("bert"), pad_id=PAD, graphs=True)
    with caplog.at_level(logging.WARNING, "mtserve.backends.graphs"):
        assert backend.graphs is None
    assert caplog.text == ""


def test_a_bucket_that_cannot_be_recorded_is_computed_plainly(caplog: pytest.LogCaptureFixture) -> None:
    backend = EagerBackend(model_of("bert"), pad_id=PAD)

    def full(_: Any) -> Any:
        raise RuntimeError("CUDA out of memory\nand much more")

    made = Graphs(backend.served, full, varlen=False)
    with caplog.at_level(logging.WARNING, "mtserve.backends.graphs"), torch.inference_mode():
        for _ in range(2):
            assert made(*lines_of(backend, rows_of((12,)))) is None
    assert caplog.text.count("passes of up to 16 tokens have no CUDA graph: RuntimeError: CUDA out of memory") == 1


def test_no_more_graphs_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    backend = EagerBackend(model_of("bert"), pad_id=PAD)
    made = Graphs(backend.served, on_cpu, varlen=False)
    with torch.inference_mode():
        found = [made(*lines_of(backend, rows_of((n,)))) is not None for n in (12, 20, 30, 12)]
    assert found == [True, True, False, True]


def test_a_pass_that_asks_its_device_is_found_before_it_is_recorded() -> None:
    x = torch.arange(4.0)
    for asks in (lambda: bool((x > 1).all()), lambda: x[0].item(), lambda: x[x > 1]):
        with pytest.raises(RuntimeError, match="reads from its device"), graphs._Silent():
            asks()
    with pytest.raises(RuntimeError, match="copies between cpu and meta"), graphs._Silent():
        x.to("meta")
    with graphs._Silent():
        x.to(torch.float64).add(1)


@pytest.mark.parametrize("family", RECORDED)
def test_a_launch_asks_its_device_for_nothing(family: str) -> None:
    """From rows to logits of every task; so a GPU's host can go on with the next batch."""
    small = tiny(family)
    backend, rows = EagerBackend(small.model, pad_id=PAD), tuple(rows_of(LENGTHS))
    batch = Batch(rows, {task.name: tuple(range(len(rows))) for task in small.tasks})
    wanted = backend.run(batch)
    with graphs._Silent():
        pending = backend.launch(batch)
    for task, arrays in pending.result().items():
        assert all(np.array_equal(one, other) for one, other in zip(arrays, wanted[task], strict=True))


def test_a_model_in_training_has_no_graphs() -> None:
    assert EagerBackend(model_of("bert"), pad_id=PAD, follow=True, graphs=True).graphs is None
