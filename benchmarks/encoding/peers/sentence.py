"""sentence-transformers: texts sorted by length in batches of so many, as `encode` does by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats


class Sentence(Peer):
    """Its pipeline ends with a normalisation, which no cosine sees."""

    def __init__(self, folder: Path, *, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        arguments = {"dtype": getattr(torch, dtype)}
        self._model = SentenceTransformer(str(folder), device="cpu", model_kwargs=arguments)
        self._rows = 32
        self.versions = {
            "sentence-transformers": sentence_transformers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def use(self, setting: Mapping[str, Any]) -> None:
        self._rows = setting["rows"]

    def encode(self, inputs: Sequence[Any]) -> Floats:
        made: Any = self._model.encode(list(inputs), batch_size=self._rows, show_progress_bar=False)
        found: Floats = made.astype("float32")
        return found


open_peer = Sentence
