"""The loss of kinds that answer for each token. Knows no kind; torch is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtserve.tasks.base import IGNORED

if TYPE_CHECKING:
    from torch import Tensor


def token_loss(logits: Tensor, targets: Sequence[Any]) -> Tensor:
    """Cross entropy of (rows, seq, n_out) logits against one (len,) target array a row, mean over counted tokens."""
    import torch
    from torch.nn import functional

    wanted = torch.full(logits.shape[:2], IGNORED)
    for row, target in enumerate(targets):
        wanted[row, : len(target)] = torch.from_numpy(target)
    wanted = wanted.to(logits.device)
    total = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp(min=1)
