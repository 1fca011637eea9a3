"""How graphs are opened: providers by preference, bound to a device, with the threads of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from mtserve.backends import bound
from mtserve.backends.bound import Bound
from mtserve.backends.runtime import Runtime
from mtserve.batching import Batch
from mtserve.errors import ConfigError
from mtserve.loading import load_checkpoint
from tests.export.bundles import Pair, backend
from tests.test_pasts import row, words

pytestmark = pytest.mark.xdist_group("bundles")  # one process makes each bundle once

CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("given", "available", "chosen"),
    [
        ({}, CUDA[1:], ("cpu",)),
        ({}, CUDA, ("cuda", "cpu")),
        ({"device": "cpu"}, CUDA, ("cpu",)),
        ({"providers": ("tensorrt", "cuda")}, ["TensorrtExecutionProvider", *CUDA], ("tensorrt", "cuda", "cpu")),
        ({"providers": ("cpu",), "device": "cuda"}, CUDA, ("cpu",)),
    ],
)
def test_providers_by_preference(given: dict[str, Any], available: list[str], chosen: tuple[str, ...]) -> None:
    assert Runtime(**given).chosen(available, "1.32.0") == chosen


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "cuda"}, r"ONNX Runtime 1.32.0 has no cuda provider; it has cpu. Install onnxruntime-gpu in place"),
        (
            {"providers": ("openvino",)},
            r"no openvino provider; it has cpu. Install the build of ONNX Runtime that has it",
        ),
        ({"providers": ("cdua",)}, r"ONNX provider 'cdua' is unknown; allowed: tensorrt, cuda, openvino, cpu"),
        ({"device": "tpu"}, r"device must be auto, cpu or cuda; found 'tpu'"),
    ],
)
def test_a_provider_that_is_not_there(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Runtime(**given).chosen(CUDA[1:], "1.32.0")


def test_what_a_gpu_is_told() -> None:
    told = Runtime(device_id=1, memory_mib=512, arena=False).options("cuda", record=True)
    assert told == {
        **{"device_id": 1, "enable_cuda_graph": "1", "gpu_mem_limit": 512 * 2**20},
        **{"arena_extend_strategy": "kSameAsRequested"},
    }
    assert Runtime(memory_mib=512).options("cpu") == {}


@pytest.mark.parametrize("record", [False, True])
def test_bound_graphs_give_what_plain_ones_give(encoder: Pair, monkeypatch: pytest.MonkeyPatch, record: bool) -> None:
    """With the CPU as the device: places are used again for shapes that come again, and only so many are kept."""
    monkeypatch.setattr(bound, "_MOST", 2)
    of = backend(encoder.engine())
    graphs = of.graphs
    batches = [
        Batch((row(words(n, n + at)), row(words(3, at))), {"topic": (0, 1), "names": (1,)})
        for n in (4, 9, 30)
        for at in (0, 1)
    ]
    plain = [of.run(batch) for batch in batches]
    monkeypatch.setattr(graphs, "_bound_trunk", Bound(graphs.trunk, "cpu", 0, record=record))
    monkeypatch.setattr(graphs, "_bound_heads", {task: Bound(one, "cpu", 0) for task, one in graphs.heads.items()})
    for batch, wanted in zip(batches, plain, strict=True):
        for _ in range(2):
            found = of.run(batch)
            for task in batch.wanted:
                for one, other in zip(found[task], wanted[task], strict=True):
                    np.testing.assert_array_equal(one, other)
    assert len(graphs._bound_trunk._recorded) == (2 if record else 0)


def test_a_provider_that_cannot_start_is_never_left_out_silently(
    encoder: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where onnxruntime-gpu finds no CUDA: the session comes up on the CPU, and says so only in a log."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: CUDA)
    opened = ort.InferenceSession

    class OnTheCpu(opened):  # type: ignore[misc, valid-type]
        def __init__(self, model: bytes, options: Any, providers: Any) -> None:
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", OnTheCpu)
    with pytest.raises(
        ConfigError, match=r"cannot start it: libraries that it needs are missing. Install CUDA and cuDNN"
    ):
        load_checkpoint(encoder.bundle)
    assert load_checkpoint(encoder.bundle, device="cpu").backend.hardware.device == "cpu"


def test_only_the_trunk_and_output_matrices_have_threads(encoder: Pair, decoder: Pair) -> None:
    code = """
import os, sys
from pathlib import Path
from mtserve.backends.runtime import Runtime
from mtserve.checkpoint import Checkpoint
from mtserve.loading import load_checkpoint
encoder, decoder = sys.argv[1:]
for folder, threads in ((encoder, 1), (encoder, 3), (decoder, 3)):  # the first starts what the process has once
    before = len(os.listdir("/proc/self/task"))
    engine = load_checkpoint(Checkpoint.open(Path(folder)), runtime=Runtime(threads=threads))
    engine.predict("topic", ["good"])
    print(len(os.listdir("/proc/self/task")) - before)
"""
    folders = [str(one.bundle.folder) for one in (encoder, decoder)]
    run = subprocess.run(
        [sys.executable, "-c", code, *folders],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.split()[1:] == ["2", "6"]  # of the decoder `forth` and `back` generate
