"""OpenVINO: the trunk converted from torch with pooling in the graph, in fp32, in bf16, or quantised to int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats, Ints, Setting, encoded, padded
from benchmarks.encoding.peers.child import read_inputs
from benchmarks.encoding.peers.export import INPUTS, config_of, pooled_trunk

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32", "int8+bf16": "bf16"}


class OpenVino(Peer):
    """One compiled model a number of streams. int8 multiplies so where it was calibrated; what is left is in fp32, or
    in bf16 as `int8+bf16`."""

    def __init__(self, folder: Path, *, threads: int, precision: str, calibration: str | None = None) -> None:
        self._pad_id = config_of(folder).get("pad_token_id") or 0
        model = self._quantized(_converted(folder), calibration) if "int8" in precision else _converted(folder)
        core = openvino.Core()
        self._compiled = {}
        for streams in {1, threads}:
            properties = {
                "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams, "INFERENCE_PRECISION_HINT": _HINTS[precision],
            }  # fmt: skip
            self._compiled[streams] = core.compile_model(model, "CPU", properties)
        self._setting = Setting(tokens=4096)
        self.versions = {"openvino": openvino.__version__}

    def use(self, setting: Mapping[str, Any]) -> None:
        self._setting = Setting(**setting)

    def encode(self, inputs: Sequence[Any]) -> Floats:
        return encoded(inputs, self._setting, self._batch, pad_id=self._pad_id)

    def _batch(self, *arrays: Ints) -> Floats:
        request = self._compiled[self._setting.streams].create_infer_request()
        made: Floats = np.array(request.infer(dict(zip(INPUTS, arrays, strict=True)))[0], np.float32)
        return made

    def _quantized(self, model: Any, calibration: str | None) -> Any:
        import nncf

        assert calibration is not None
        rows: list[Any] = list(read_inputs(Path(calibration)))
        batches = [dict(zip(INPUTS, padded([row], pad_id=self._pad_id), strict=True)) for row in rows]
        return nncf.quantize(
            model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches),
            preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip


def _converted(folder: Path) -> Any:
    import torch

    ids = torch.ones(2, 8, dtype=torch.long)
    trunk = pooled_trunk(folder, attention="sdpa")
    example = dict(zip(INPUTS, (ids, ids, 0 * ids), strict=True))
    free = [(name, [-1, -1], np.int64) for name in INPUTS]
    return openvino.convert_model(trunk, example_input=example, input=free)


open_peer = OpenVino
