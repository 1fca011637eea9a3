"""Features of one task as a batch: dictionaries in, padded tensors out. Knows no task, no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtserve.errors import ConfigError
from mtserve.tasks.base import IGNORED

_FILLS = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
_Features = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class FeatureCollator:
    """Pads ids, mask, type ids and per-token labels at the right to the longest row: (rows, seq), int64.

    Padding that features bring along is cut first, so features padded to a fixed length cost no more than others.
    A feature of several rows (multiple choice) has a list a choice and becomes (rows, choices, seq). Other numbers are
    stacked, whole ones as int64 and others as float32; strings are left out. Raises ConfigError for features that make
    no batch, and for per-token labels none of which counts: their loss would be no number.
    """

    pad_id: int
    multiple_of: int = 1

    def __call__(self, features: _Features) -> dict[str, Tensor]:
        names = [name for name, value in features[0].items() if not isinstance(value, str)]
        for at, feature in enumerate(features):
            if absent := [name for name in names if name not in feature]:
                raise ConfigError(f"feature {at} of the batch has no {absent[0]}; it has {', '.join(feature)}")
        rows = self._rows(features, names) if "input_ids" in names else {}
        others = [name for name in names if name not in rows]
        return rows | {name: _stacked(name, [np.asarray(feature[name]) for feature in features]) for name in others}

    def _rows(self, features: _Features, names: Sequence[str]) -> dict[str, Tensor]:
        """The columns with a value a token, padded."""
        nested = np.ndim(features[0]["input_ids"][0]) > 0
        counts = {len(feature["input_ids"]) if nested else 1 for feature in features}
        if len(counts) > 1:
            raise ConfigError(f"features of one batch have different numbers of choices: {sorted(counts)}")
        columns = _columns(features, names, nested=nested)
        lengths = [int(mask.nonzero()[0].max(initial=-1)) + 1 for mask in columns["attention_mask"]]
        for at, (labels, size) in enumerate(zip(columns.get("labels", ()), lengths, strict=False)):
            if (labels[:size] == IGNORED).all():
                start = columns["input_ids"][at][:8].tolist()
                raise ConfigError(
                    f"row {at} of the batch, ids {start} …, has no label that counts; was its target cut?"
                )
        longest = -(-max(lengths) // self.multiple_of) * self.multiple_of
        shape = (len(features), *counts, longest) if nested else (len(features), longest)
        padded = {}
        for name, arrays in columns.items():
            filled = np.full((len(arrays), longest), _FILLS.get(name, self.pad_id), np.int64)
            for row, array, size in zip(filled, arrays, lengths, strict=True):
                row[:size] = array[:size]
            padded[name] = torch.from_numpy(filled.reshape(shape))
        return padded


def _columns(features: _Features, names: Sequence[str], *, nested: bool) -> dict[str, list[Any]]:
    """Arrays of one row each, (seq,), by name; of features with choices a row a choice. A mask is there in any case."""
    wanted = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in names]
    if "labels" in names and not nested:
        labels = np.asarray(features[0]["labels"])
        if labels.shape == (len(features[0]["input_ids"]),) and np.issubdtype(labels.dtype, np.integer):
            wanted.append("labels")
    columns = {
        name: [np.asarray(row) for feature in features for row in (feature[name] if nested else [feature[name]])]
        for name in wanted
    }
    ids = columns["input_ids"]
    columns.setdefault("attention_mask", [np.ones_like(row) for row in ids])
    for name, arrays in columns.items():
        for at, (array, row) in enumerate(zip(arrays, ids, strict=True)):
            if array.shape != row.shape:
                raise ConfigError(f"row {at} of the batch has {len(row)} ids, but {name} of the shape {array.shape}")
    return columns


def _stacked(name: str, arrays: Sequence[Any]) -> Tensor:
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise ConfigError(f"{name} has different shapes in one batch: {sorted(shapes)}")
    stacked = np.stack(arrays)
    return torch.from_numpy(stacked.astype(np.float32 if np.issubdtype(stacked.dtype, np.floating) else np.int64))
