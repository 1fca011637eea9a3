"""CTranslate2: the trunk converted by its own converter, in fp32 or int8; it leaves padding out of its products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats, Ints, Setting, encoded, pooled
from benchmarks.encoding.peers.export import config_of

_NAMES = {"fp32": "float32", "int8": "int8"}


class CTranslate2(Peer):
    """One encoder a number of streams."""

    def __init__(self, folder: Path, *, threads: int, precision: str) -> None:
        name = _NAMES[precision]
        output = folder / "ct2" / name
        if not output.exists():
            TransformersConverter(str(folder)).convert(str(output), quantization=name)
        self._encoders = {
            streams: ctranslate2.Encoder(
                str(output), device="cpu", compute_type=name, inter_threads=streams, intra_threads=threads // streams
            )
            for streams in {1, threads}
        }
        self._pad_id = config_of(folder).get("pad_token_id") or 0
        self._setting = Setting(tokens=4096)
        self.versions = {"ctranslate2": ctranslate2.__version__}

    def use(self, setting: Mapping[str, Any]) -> None:
        self._setting = Setting(**setting)

    def encode(self, inputs: Sequence[Any]) -> Floats:
        return encoded(inputs, self._setting, self._batch, pad_id=self._pad_id)

    def _batch(self, ids: Ints, mask: Ints, types: Ints) -> Floats:
        lengths = mask.sum(1)
        made = self._encoders[self._setting.streams].forward_batch(
            ctranslate2.StorageView.from_array(ids.astype(np.int32)),
            lengths=ctranslate2.StorageView.from_array(lengths.astype(np.int32)),
            token_type_ids=[row[:length].tolist() for row, length in zip(types, lengths, strict=True)],
        )
        return pooled(np.array(made.last_hidden_state), mask)


open_peer = CTranslate2
