"""What only a GPU shows: its answers, that nothing waits for it, and recorded passes. `make gpu-check` runs these."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch

from mtserve.backends import flat
from mtserve.backends.eager import EagerBackend
from mtserve.batching import Batch
from mtserve.engine import Engine
from mtserve.rows import Past, Row
from tests.test_engine_ahead import assert_near
from tests.test_graphs import RECORDED
from tests.test_serving import FLAT, LENGTHS, PADDED, rows_of
from tests.tiny import PAD, Tiny, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

NEAR = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.2}  # random weights this wide are harder than trained ones
FAMILIES_HERE = [family for family in (*FLAT, *PADDED) if family != "qwen2"]


def on_gpu(family: str, profile: str = "fp32", **how: Any) -> tuple[Tiny, EagerBackend]:
    """The tiny model of a family on the CPU, and a backend over an equal one on the GPU."""
    return tiny(family), EagerBackend(tiny(family).model.to("cuda"), pad_id=PAD, profile=profile, **how)


def every_task(small: Tiny, rows: list[Row]) -> Batch:
    return Batch(tuple(rows), {task.name: tuple(range(len(rows))) for task in small.tasks})


def assert_answers(found: Any, wanted: Any, near: float) -> None:
    assert found.keys() == wanted.keys()
    for task, arrays in wanted.items():
        scale = max(1.0, max(float(np.abs(one).max()) for one in arrays))
        for one, other in zip(found[task], arrays, strict=True):
            np.testing.assert_allclose(one, other, atol=near * scale, rtol=0, err_msg=task)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("profile", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_answers_are_those_of_a_cpu(family: str, profile: str, graphs: bool) -> None:
    small, backend = on_gpu(family, profile, graphs=graphs)
    for rows in (rows_of(LENGTHS), rows_of((8,), types=True), rows_of((30, 2))):
        batch = every_task(small, rows)
        assert_answers(backend.run(batch), small.engine.backend.run(batch), NEAR[profile])


@pytest.mark.parametrize("profile", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FLAT)
def test_rows_of_all_lengths_are_attended_in_one_call(family: str, profile: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no kernel for rows of different lengths")
    if family != "qwen2":
        _, backend = on_gpu(family, profile)
        assert isinstance(backend.served.layout([3, 2]), flat.Varlen)


@pytest.mark.parametrize("profile", ["fp32", "bf16"])
@pytest.mark.parametrize("family", RECORDED)
def test_passes_over_few_tokens_are_recorded(family: str, profile: str, caplog: pytest.LogCaptureFixture) -> None:
    small, backend = on_gpu(family, profile, graphs=True)
    plain = EagerBackend(backend.model, pad_id=PAD, profile=profile)
    with caplog.at_level(logging.WARNING):
        assert backend.graphs is not None
        for lengths in ((5,), (20, 9), (31,), (9, 9, 9), (11, 7), (60, 40, 3), (5,)):
            batch = every_task(small, rows_of(lengths, types=True))
            assert_answers(backend.run(batch), plain.run(batch), NEAR[profile])
    assert "no CUDA graph" not in caplog.text
    assert len(backend.graphs.recorded) >= 3
    assert all(made is not None for made in backend.graphs.recorded.values())


def test_a_recording_does_not_mind_other_threads() -> None:
    """Another trunk's engine may compute while one records."""
    small, backend = on_gpu("bert", graphs=True)
    other = EagerBackend(tiny("roberta").model.to("cuda"), pad_id=PAD)
    batch, ends, failed = every_task(small, rows_of(LENGTHS)), threading.Event(), list[BaseException]()

    def compute() -> None:
        try:
            while not ends.is_set():
                other.run(batch)
        except BaseException as error:
            failed.append(error)

    other.run(batch)
    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for length in (9, 20, 30, 45, 60):
            one = every_task(small, rows_of((length,)))
            assert_answers(backend.run(one), small.engine.backend.run(one), NEAR["fp32"])
    finally:
        ends.set()
        thread.join()
    assert not failed
    assert backend.graphs is not None
    assert all(made is not None for made in backend.graphs.recorded.values())


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", RECORDED)
def test_a_launch_waits_for_nothing(family: str, graphs: bool) -> None:
    small, backend = on_gpu(family, "bf16", graphs=graphs)
    batch = every_task(small, rows_of(LENGTHS))
    wanted = backend.run(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = backend.launch(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_answers(pending.result(), wanted, 1e-6)


def test_a_batch_is_under_way_while_the_next_is_launched() -> None:
    small, backend = on_gpu("bert")
    batches = [every_task(small, rows_of((length, 3))) for length in (20, 9)]
    wanted = [backend.run(batch) for batch in batches]
    with backend.lane.entered():
        torch.cuda._sleep(500_000_000)  # type: ignore[no-untyped-call]  # some tenths of a second
    first = backend.launch(batches[0])
    second = backend.launch(batches[1])
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with backend.lane.entered():
        done.record()
    assert not done.query()
    for pending, other in zip((first, second), wanted, strict=True):
        assert_answers(pending.result(), other, 1e-6)


def test_answers_lie_in_memory_that_may_be_kept() -> None:
    small, backend = on_gpu("bert")
    for arrays in backend.run(every_task(small, rows_of(LENGTHS))).values():
        assert not any(torch.from_numpy(one).is_pinned() for one in arrays)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2"])
def test_predictions_are_those_of_a_cpu(family: str, graphs: bool) -> None:
    small, backend = on_gpu(family, graphs=graphs)
    engine = Engine(small.tasks, backend, small.text, max_batch_tokens=40)
    for task in small.tasks:
        sample = task.kind.sample(task.options)
        assert_near(engine.predict(task.name, [sample] * 3), small.engine.predict(task.name, [sample] * 3))


@pytest.mark.parametrize("profile", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_generation_goes_on(family: str, profile: str) -> None:
    _, backend = on_gpu(family, profile)
    assert backend.keeps

    def answers(rows: list[Row]) -> list[Any]:
        return backend.run(Batch(tuple(rows), {"forth": tuple(range(len(rows)))}))["forth"]

    rows = [row.extended([], past=Past()) for row in rows_of((5, 9, 2))]
    for step in range(4):
        for found, row in zip(answers(rows), rows, strict=True):
            (whole,) = answers([row.extended([], past=None)])
            np.testing.assert_allclose(found, whole, atol=NEAR[profile] * max(1.0, float(np.abs(whole).max())))
        more = [[7 + step] * (1 + (at == step % 3)) for at in range(3)]
        rows = [row.extended(tokens, past=row.past) for row, tokens in zip(rows, more, strict=True)]
    rows.clear()
    backend.release()
    assert backend.pasts.shape == (0, 0)


def test_a_model_that_moves_is_followed() -> None:
    small = tiny("bert")
    backend = EagerBackend(small.model, pad_id=PAD, follow=True)
    batch = every_task(small, rows_of(LENGTHS))
    wanted = backend.run(batch)
    for device in ("cuda", "cpu", "cuda"):
        small.model.to(device)
        assert_answers(backend.run(batch), wanted, NEAR["fp32"])
