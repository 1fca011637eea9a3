"""Transformers' feature-extraction pipeline: texts sorted by their characters, tensors out, mean over real tokens.

It gives states with those of the padding; how many tokens a text has is looked up, which costs it nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import pipeline

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats

_MAX_LENGTH = 256


class Pipeline(Peer):
    def __init__(self, folder: Path, *, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._pipe: Any = pipeline("feature-extraction", str(folder), dtype=getattr(torch, dtype), device="cpu")
        self._rows = 8
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def use(self, setting: Mapping[str, Any]) -> None:
        self._rows = setting["rows"]

    def prepare(self, inputs: Sequence[str]) -> Any:
        """Each text with the number of its tokens."""
        ids = self._pipe.tokenizer(list(inputs), truncation=True, max_length=_MAX_LENGTH)["input_ids"]
        return list(zip(inputs, map(len, ids), strict=True))

    @torch.inference_mode()
    def encode(self, inputs: Sequence[tuple[str, int]]) -> Floats:
        order = sorted(range(len(inputs)), key=lambda at: -len(inputs[at][0]))
        options = {"truncation": True, "max_length": _MAX_LENGTH}
        texts = [inputs[at][0] for at in order]
        states = self._pipe(texts, batch_size=self._rows, return_tensors=True, tokenize_kwargs=options)
        means = [one[0, : inputs[at][1]].mean(0) for one, at in zip(states, order, strict=True)]
        made = torch.empty(len(inputs), len(means[0]))
        made[torch.tensor(order)] = torch.stack(means).float()
        found: Floats = made.numpy()
        return found


open_peer = Pipeline
