"""The same encoder exported to ONNX: CUDA's provider beside the PyTorch backend, io-binding on and off, agreement.

Without ONNX Runtime for GPUs, or what exports, it is one line that says what is missing: a lent machine has no network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.gpu_check.encoder import PROOF, TASK, Encoder, with_padding
from benchmarks.gpu_check.lines import Line, checked, median
from mtserve.backends.base import Backend
from mtserve.batching import Batch

_NEEDED = ("onnxruntime", "onnx", "onnxscript", "optimum")
_TOLERANCES = {"fp32": 1e-3, "fp16": 0.02}


def bundles(of: Encoder) -> Iterator[Line]:
    """Milliseconds from rows to logits at rows of several lengths, a batch of tokens each."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        yield Line("onnx", f"left out: {missing[0]} is not installed")
        return
    import onnxruntime as ort

    if of.device.type == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        yield Line("onnx", f"left out: onnxruntime {ort.__version__} has no CUDA provider")
        return
    with tempfile.TemporaryDirectory() as home:
        found = dict(_exported(of, Path(home)))
        for name, backend in found.items():
            precision, form = name.split(", ", 1)
            rows = of.rows(PROOF)
            wanted = with_padding(of.on_cpu, rows).numpy()
            logits = np.stack(backend.run(_batch(of, PROOF))[TASK])
            off = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
            said = checked(off, _TOLERANCES[precision])
            yield Line("onnx agreement", "logits", precision, form, off, "of the largest", outcome=said)
        beside = {f"{precision}, PyTorch": of.backend(precision) for precision in ("bf16", "fp32")}
        shapes = [*of.sizes.requests, *((of.sizes.batch_tokens // n, n) for n in of.sizes.lengths)]
        for count, length in shapes:
            batch, lengths = _batch(of, [length] * count), [length] * count
            for name, one in {**beside, **found}.items():
                precision, form = name.split(", ", 1)
                seconds = median(lambda b=one, x=batch: b.run(x), of.device, calls=max(2, of.sizes.calls // 4))
                share = of.share(precision, lengths, seconds)
                yield Line("onnx", f"{count} x {length}", precision, form, 1e3 * seconds, "ms", share)


def _exported(of: Encoder, home: Path) -> Iterator[tuple[str, Backend]]:
    from mtserve.backends.onnx import OnnxBackend
    from mtserve.backends.runtime import Runtime
    from mtserve.backends.sessions import Graphs
    from mtserve.bundle import Dtype
    from mtserve.export.made import Made

    for fuse in (False, True):
        made = Made.of(of.on_cpu, [TASK], fuse=fuse, keeps=False)
        dtypes: tuple[Dtype, ...] = ("fp32", "fp16") if fuse else ("fp32",)
        for dtype in dtypes:
            folder = home / f"{dtype}-{fuse}"
            entry = made.write(folder, dtype, checkpoint="random")
            for binding in (True, False) if of.device.type == "cuda" else (True,):
                runtime = Runtime(device=of.device.type, io_binding=binding)
                form = f"ONNX {'fused' if fuse else 'plain'}{'' if binding else ', no io-binding'}"
                yield f"{dtype}, {form}", OnnxBackend(Graphs(folder, entry, runtime), pad_id=0)


def _batch(of: Encoder, lengths: list[int] | tuple[int, ...]) -> Batch:
    return Batch(tuple(of.rows(lengths)), {TASK: tuple(range(len(lengths)))})
