"""ONNX Runtime: the exported trunk with pooling in the graph, its attention fused, fp32 or dynamic int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats, Ints, Setting, encoded
from benchmarks.encoding.peers.export import INPUTS, config_of, fuse


class OnnxRuntime(Peer):
    """One session a number of streams; a stream has one thread, or all where there is one stream."""

    def __init__(self, folder: Path, *, threads: int, precision: str) -> None:
        path = graph(folder, precision)
        self._sessions = {1: _session(path, threads), threads: _session(path, 1)} if threads > 1 else {}
        self._sessions.setdefault(1, _session(path, threads))
        self._pad_id = config_of(folder).get("pad_token_id") or 0
        self._setting = Setting(tokens=4096)
        self.versions = {"onnxruntime": onnxruntime.__version__}

    def use(self, setting: Mapping[str, Any]) -> None:
        self._setting = Setting(**setting)

    def encode(self, inputs: Sequence[Any]) -> Floats:
        return encoded(inputs, self._setting, self._batch, pad_id=self._pad_id)

    def _batch(self, *arrays: Ints) -> Floats:
        made: Floats = self._sessions[self._setting.streams].run(None, dict(zip(INPUTS, arrays, strict=True)))[0]
        return made


def graph(folder: Path, precision: str) -> Path:
    """The graph in a precision, made beside `pooled.onnx` where it is missing.

    int8: weights by channel, activations when they come; the tables of embeddings stay as they are.
    """
    fused, int8 = folder / "onnx" / "fused.onnx", folder / "onnx" / "int8.onnx"
    if not fused.exists():
        fuse(folder / "onnx" / "pooled.onnx", fused, config_of(folder))
    if precision == "int8" and not int8.exists():
        types = ["MatMul", "Attention"]
        quantize_dynamic(
            fused, int8, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=types,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )  # fmt: skip
    return {"fp32": fused, "int8": int8}[precision]


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


open_peer = OnnxRuntime
