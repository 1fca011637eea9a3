"""The loss of kinds that answer for each token. Knows no kind; torch is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtserve.tasks.base import IGNORED, PLAIN, LossTerms

if TYPE_CHECKING:
    from torch import Tensor


def token_loss(logits: Tensor, targets: Sequence[Any], terms: LossTerms = PLAIN) -> Tensor:
    """Cross entropy of (rows, seq, n_out) logits against one (len,) target array a row, mean over counted tokens.

    With class weights the mean is PyTorch's: over the weights of the counted targets. 0 where no token counts.
    """
    import torch
    from torch.nn import functional

    wanted = torch.full(logits.shape[:2], IGNORED)
    for row, target in enumerate(targets):
        wanted[row, : len(target)] = torch.from_numpy(target)
    wanted = wanted.to(logits.device)
    weights = None if terms.class_weights is None else logits.new_tensor(terms.class_weights)
    total = functional.cross_entropy(
        logits.flatten(0, 1),
        wanted.flatten(),
        weights,
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=terms.label_smoothing,
    )
    counted = wanted != IGNORED
    if weights is None:
        return total / counted.sum().clamp(min=1)
    return total / (weights[wanted.clamp(min=0)] * counted).sum().clamp(min=1e-12)
