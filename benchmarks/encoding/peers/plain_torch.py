"""The stock Transformers trunk in PyTorch, padded batches. Knows nothing of mtserve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel

from benchmarks.encoding.peers.base import Peer
from benchmarks.encoding.peers.batching import Floats, Ints, Setting, encoded


class PlainTorch(Peer):
    """Attention as the library chooses it; the pooler is left out, since nobody reads it."""

    def __init__(self, folder: Path, *, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._trunk: Any = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype), add_pooling_layer=False)
        self._trunk.eval()
        self._setting = Setting(tokens=4096)
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def use(self, setting: Mapping[str, Any]) -> None:
        self._setting = Setting(**setting)

    @torch.inference_mode()
    def encode(self, inputs: Sequence[Any]) -> Floats:
        return encoded(inputs, self._setting, self._batch, pad_id=self._trunk.config.pad_token_id or 0)

    def _batch(self, ids: Ints, mask: Ints, types: Ints) -> Floats:
        ids_, mask_, types_ = (torch.from_numpy(array) for array in (ids, mask, types))
        hidden = self._trunk(input_ids=ids_, attention_mask=mask_, token_type_ids=types_).last_hidden_state
        weights = mask_[:, :, None].to(hidden.dtype)
        pooled: Floats = ((hidden * weights).sum(1).float() / mask_.sum(1, keepdim=True)).numpy()
        return pooled


open_peer = PlainTorch
