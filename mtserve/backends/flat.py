"""Rows end to end in one sequence: which tokens see which, and the attention that keeps rows apart. Knows no heads.

Every other layer of a trunk treats tokens alone, so it may be given all real tokens of all rows as one sequence. The
attention is called through Transformers' attention interface with the keyword `layout`, which says where rows begin and
end; positions restart in each row. Families that do not hand the keyword on are found by `mtserve.backends.serving`.

Shapes: query (heads, tokens, dim); key and value (kv_heads, tokens, dim) of fresh rows, or (rows, kv_heads, kv, dim) of
rows that go on from kept ones; the result (tokens, heads, dim). Grouped-query attention follows Ainslie et al. (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mtserve.backends.staging import sent

NAME = "mtserve_flat"
HALVES = (torch.float16, torch.bfloat16)
_HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "deterministic", "cache_position"})
"""Keywords that change nothing about which tokens see which, or are given to layers that computed with them before."""


class Layout(Protocol):
    """How the rows of one pass lie, and what each of its tokens sees."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        """`window`: a token sees those less than so many positions away."""
        ...


@dataclass(frozen=True)
class Groups:
    """Fresh rows, those of equal length next to each other: one kernel call a length, and no padding.

    parts     (first token, rows, length of each row)
    filling   tokens after those of the rows, of which nothing is read
    """

    parts: tuple[tuple[int, int, int], ...]
    filling: int = 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        found = []
        for first, rows, length in self.parts:
            if len(self.parts) == rows == 1 and not self.filling:  # nothing to cut, which a short request notices
                q, k, v = query[None], key[None], value[None]
            else:
                q, k, v = (
                    of[:, first : first + rows * length].view(len(of), rows, length, -1).transpose(0, 1)
                    for of in (query, key, value)
                )  # (rows, heads, length, dim)
            banded = window is not None and window < length
            if _short(q):
                mask = _band(length, window, causal=causal, like=q) if banded or causal else None
                out = _products(q, k, v, mask, scale=scale)
            else:
                mask = _band(length, window, causal=causal, like=q) if banded else None
                out = scaled_dot_product_attention(
                    q, k, v, mask, is_causal=causal and not banded, scale=scale, enable_gqa=len(query) != len(key)
                )
            found.append(out.transpose(1, 2).flatten(0, 1))
        if self.filling:
            found.append(query.new_zeros(self.filling, len(query), value.shape[2]))
        return found[0] if len(found) == 1 else torch.cat(found)


def _short(query: Tensor) -> bool:
    """Whether whole matrix products are faster than the flash kernel on a CPU, whose tiles are larger than short rows:
    (rows, heads, length, dim)."""
    rows, _, length, _ = query.shape
    return query.device.type == "cpu" and length <= MOST_MULTIPLIED and (rows > 1 or query.dtype == torch.float32)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None) -> Tensor:
    """softmax(q k scale + mask) v with all scores in memory: (rows, heads, length, dim)."""
    if query.shape[1] != key.shape[1]:
        each = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    q, k, v = (of.flatten(0, 1) for of in (query, key, value))  # (rows * heads, length, dim)
    added, beta = (q.new_empty(1, 1, 1), 0.0) if mask is None else (mask[None], 1.0)
    scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=beta, alpha=scale or q.shape[2] ** -0.5)
    return torch.bmm(torch.softmax(scores, -1), v).view(*query.shape[:3], -1)


@dataclass(frozen=True)
class Block:
    """A few fresh rows of different lengths: one kernel call over all tokens, masked so that rows are kept apart.

    lengths   of the rows in order
    """

    lengths: tuple[int, ...]

    @cached_property
    def _rows(self) -> Tensor:
        return torch.repeat_interleave(torch.tensor(self.lengths))

    @cached_property
    def _masks(self) -> dict[tuple[bool, int | None], Tensor]:
        return {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        if (causal, window) not in self._masks:
            together = self._rows[:, None] == self._rows
            seen = together & _seen(len(self._rows), window, causal=causal)
            self._masks[causal, window] = _added(seen, query)
        mask = self._masks[causal, window]
        out = scaled_dot_product_attention(
            query[None], key[None], value[None], mask, scale=scale, enable_gqa=len(query) != len(key)
        )
        return out[0].transpose(0, 1)


@dataclass(frozen=True)
class Varlen:
    """Fresh rows on a GPU: one call of PyTorch's variable-length flash attention (Dao, 2023), fp16 or bf16.

    limits   (rows + 1,) int32: where rows begin and end
    """

    limits: Tensor
    longest: int

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        side = -1 if window is None else window - 1
        grouped: dict[str, Any] = {"enable_gqa": True} if len(query) != len(key) else {}  # not every PyTorch knows it
        q, k, v = (of.transpose(0, 1).contiguous() for of in (query, key, value))
        out = varlen_attn(
            q, k, v, self.limits, self.limits, self.longest, self.longest,
            scale=scale, window_size=(side, 0 if causal else side), **grouped,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out


@dataclass(frozen=True)
class Rectangle:
    """Rows that go on from kept keys and values: the queries of a row side by side, padded where rows have more.

    shape   rows, and most new tokens of one
    place   (tokens,) of each token in that rectangle; None where all rows have equally many
    mask    (rows, 1, seq, kv), added to the scores
    """

    shape: tuple[int, int]
    place: Tensor | None
    mask: Tensor

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        new = query.transpose(0, 1)  # (tokens, heads, dim)
        if self.place is not None:
            full = new.new_zeros(self.shape[0] * self.shape[1], *new.shape[1:])
            new = full.index_copy_(0, self.place, new)
        q = new.reshape(*self.shape, *new.shape[1:]).transpose(1, 2)  # (rows, heads, seq, dim)
        out = scaled_dot_product_attention(q, key, value, self.mask, scale=scale, enable_gqa=q.shape[1] != key.shape[1])
        out = out.transpose(1, 2).flatten(0, 1)
        return out if self.place is None else out.index_select(0, self.place)


def _seen(size: int, window: int | None, *, causal: bool) -> Tensor:
    """(size, size) bool: which position sees which."""
    at = torch.arange(size)
    away = at[:, None] - at
    seen = away >= 0 if causal else torch.ones(size, size, dtype=torch.bool)
    return seen if window is None else seen & (away.abs() < window)


def _added(seen: Tensor, like: Tensor) -> Tensor:
    """A mask of what is seen as what is added to scores, in the precision and on the device of `like`."""
    return sent(torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf), like.device)


def _band(length: int, window: int | None, *, causal: bool, like: Tensor) -> Tensor:
    return _added(_seen(length, window, causal=causal), like)


MOST_MULTIPLIED = 96
"""Longest rows whose scores are computed as one product, several rows and heads at once."""
MOST_BLOCKED = 128
"""Tokens up to which rows of different lengths share one masked kernel call."""


def filling(tokens: int) -> int:
    """Tokens to put after those of all rows, so that passes have few sizes. A CPU's kernels are made for each size:
    that takes milliseconds, and each kernel, of which a thousand are kept, a quarter of a megabyte."""
    step = 4 if tokens <= 32 else 8 if tokens <= 128 else 16 if tokens <= 512 else 64
    return -tokens % step


def fresh(lengths: Sequence[int], varlen: torch.device | None = None, *, fill: int = 0) -> Layout:
    """The layout of fresh rows that lie in this order, longest first, with so many tokens of no row after them; with
    `varlen` for that kernel on a device."""
    if varlen is not None:
        limits = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return Varlen(sent(limits, varlen), max(lengths))
    if lengths[0] == lengths[-1]:
        return Groups(((0, len(lengths), lengths[0]),), fill)
    if sum(lengths) <= MOST_BLOCKED:
        return Block((*lengths, fill) if fill else tuple(lengths))
    parts, first = [], 0
    for length, rows in zip(*_runs(lengths), strict=True):
        parts.append((first, rows, length))
        first += rows * length
    return Groups(tuple(parts), fill)


def _runs(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Lengths that stand next to each other once each, and how many there are of each."""
    changes = np.flatnonzero(np.diff(lengths)) + 1
    first = np.concatenate([[0], changes])
    rows = np.diff(np.concatenate([first, [len(lengths)]]))
    return [lengths[at] for at in first], rows.tolist()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As Transformers calls an attention function: query (1, heads, tokens, dim) to (1, tokens, heads, dim).

    Raises NotImplementedError for a family that asks its attention for something else (a bias, a soft cap).
    """
    asked = {name for name, given in others.items() if given is not None and given is not False} - _HARMLESS
    if layout is None or asked or attention_mask is not None:
        found = ", ".join(sorted(asked)) or ("no layout" if layout is None else "a mask")
        raise NotImplementedError(f"attention of flat rows was called with {found}")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    kept = isinstance(layout, Rectangle)
    keys, values = (key, value) if kept else (key[0], value[0])
    return layout.attend(query[0], keys, values, scale=scaling, causal=causal, window=sliding_window)[None], None


def register() -> None:
    """Make the attention known to Transformers under NAME; doing it again changes nothing. No masks are made for one
    that has no function for them: what tokens see is in the layout."""
    AttentionInterface.register(NAME, attend)
