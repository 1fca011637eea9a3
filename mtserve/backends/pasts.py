"""Keys and values of sequences that go on, as the cache that Transformers' trunks write into and read from. Which past
has which slot is in `slots`. Knows no tasks, no heads and no trunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from mtserve.backends.slots import Indexes, Slots
from mtserve.backends.staging import moved, sent
from mtserve.rows import Row


@dataclass(frozen=True)
class _Plan:
    """What one pass does in every layer.

    new     which of the pass's tokens, in their order, are kept; None: all
    into    where they go: slot * capacity + position
    slots   whose keys and values are read; None: only those of the pass itself
    length  how many of them are read
    """

    new: Tensor | None
    into: Tensor
    slots: slice | Tensor | None
    length: int


@dataclass(frozen=True)
class Seen:
    """What rows that go on see.

    positions   (rows, seq) of the new tokens
    mask        (rows, 1, seq, kv), added to the scores
    place       of each new token in the rectangle of rows and seq; None where it is full
    """

    positions: Tensor
    mask: Tensor
    place: Tensor | None


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
    """keys, values: (slots, capacity, heads, head_dim), so that a token's are in one place and copied in one go."""

    def __init__(self, pasts: Pasts) -> None:
        super().__init__()
        self.pasts = pasts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.pasts.shape
        self.keys, self.values = (
            new.new_zeros(*shape, new.shape[1], new.shape[3]) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in what a pass computed, (rows, heads, seq, head_dim), and give what its queries see: kv for seq."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, kept: Tensor, new: Tensor) -> Tensor:
        plan = self.pasts.plan
        flat = new.transpose(1, 2).flatten(0, 1)  # (rows * seq, heads, head_dim)
        kept.flatten(0, 1).index_copy_(0, plan.into, flat if plan.new is None else flat[plan.new])
        return new if plan.slots is None else kept[plan.slots, : plan.length].transpose(1, 2)

    def resize(self, slots: int, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(slots, capacity, *old.shape[2:])
            both = slice(min(slots, old.shape[0])), slice(min(capacity, old.shape[1]))
            new[both] = old[both]
            setattr(self, name, new)

    def copy(self, source: Tensor, into: Tensor) -> None:
        for kept in (self.keys.flatten(0, 1), self.values.flatten(0, 1)):
            kept.index_copy_(0, into, kept.index_select(0, source))

    def get_seq_length(self) -> int:
        return 0  # positions and masks of rows that go on are given to the trunk, so families need not count

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class Pasts(Cache):  # type: ignore[misc]  # transformers is not followed
    """All pasts of a backend. `slots` is asked first (`admit`, `known`), then `begin` before a trunk pass and
    `slots.done` after it."""

    plan: _Plan

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=partial(_Layer, self))
        self.slots = Slots(self)

    @property
    def shape(self) -> tuple[int, int]:
        return self.slots.shape

    def clear(self) -> None:
        self.layers.clear()

    def resize(self, slots: int, capacity: int) -> None:
        for layer in self.layers:
            layer.resize(slots, capacity)

    def copy(self, source: Indexes, into: Indexes, capacity: int) -> None:
        if self.layers:
            on_device = [moved(side, self.layers[0].keys.device) for side in (source, into)]
            for layer in self.layers:
                layer.copy(*on_device)

    def begin(self, rows: Sequence[Row], known: Sequence[int], like: Tensor, *, flat: bool) -> Seen | None:
        """Make ready for a pass that computes `rows` but for their first `known` tokens, which lie end to end (`flat`)
        or padded at the right. What rows that go on see, in the precision and on the device of `like`; None if no row
        knows a token.
        """
        steps = self.slots.begin(rows, known)
        into, real = moved(steps.into, like.device), steps.real
        kept = steps.new[real] if flat else steps.new.ravel()
        which = None if kept.all() else moved(np.flatnonzero(kept), like.device)
        if not steps.known.any():
            self.plan = _Plan(which, into, None, 0)
            return None
        read = steps.read
        self.plan = _Plan(which, into, read if isinstance(read, slice) else moved(read, like.device), steps.length)
        seen = np.arange(steps.length) <= steps.positions[:, :, None]  # (rows, seq, kv)
        added = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-math.inf))[:, None])
        place = None if real.all() else moved(np.flatnonzero(real), like.device)
        return Seen(moved(steps.positions, like.device), sent(added.to(like.dtype), like.device), place)


def reach(config: PretrainedConfig) -> float:
    """Longest row for which the keys and values of a longer row's beginning are those of the beginning alone, and each
    position sees all before it: the shortest of a family's windows, and where its rotary angles begin to change."""
    rope = getattr(config, "rope_parameters", None) or {}
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    if rope.get("rope_type") in ("dynamic", "longrope"):
        windows.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min((size for size in windows if size), default=math.inf)
