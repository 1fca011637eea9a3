"""Training on a CPU: dropout from an eighth of the random numbers, and attention over short rows as matrix products.

torch draws a number for each element that dropout may zero, one after the other, which takes a sixth of a training step
of a small encoder; and its fused attention, made for long rows, spends as much on the gradients of short ones as
the matrix products of a backward pass together. Both are replaced in a forward pass, wherever a model calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LONGEST = 512
"""Keys of a row, from which on torch's fused attention is left to it: scores of all pairs take memory."""


class OnCpu(TorchFunctionMode):
    """While entered, `dropout` and `scaled_dot_product_attention` on CPU tensors whose gradients are wanted are ours.

    Not for a model that computes activations again in the backward pass: they would not be the same there.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        if func is functional.dropout and _ours(args):
            return _dropout(*args, **given)
        if func is functional.scaled_dot_product_attention and _ours(args) and args[1].shape[-2] <= LONGEST:
            return _attention(*args, **given)
        return func(*args, **given)


def dropped(states: Tensor, share: float) -> Tensor:
    """The states with about a share of them zero, the others larger by as much as keeps the mean.

    Each is decided by a byte, so the share is that of a multiple of 1/256, the nearest one; a byte is an eighth of a
    random number.
    """
    limit = min(round(share * 256), 255) if share < 1 else 256
    if limit == 256:
        return states * 0
    count = states.numel()
    drawn = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.uint8)[:count].view(states.shape) >= limit
    return states * kept.to(states.dtype).mul_(256 / (256 - limit))


def _ours(args: Sequence[Any]) -> bool:
    return bool(args) and args[0].device.type == "cpu" and torch.is_grad_enabled()


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002, FBT001, FBT002 - torch's
    if not training or p == 0:
        return input
    return dropped(input, p)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - torch's
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """(…, heads, rows, width), as torch's documentation spells it in code; precisions are autocast's."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        size = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(size, dtype=torch.bool).tril().logical_not(), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    shares = scores.softmax(-1).to(value.dtype)
    return (dropped(shares, dropout_p) if dropout_p else shares) @ value
