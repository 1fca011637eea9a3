"""The losses of kinds that answer for each token, or with a distribution. Knows no kind; torch is imported when one is
called."""

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
    from torch.nn import functional

    wanted = _wanted(logits, targets)
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


def divergence(logits: Tensor, other: Tensor, *, sigmoid: bool = False) -> Tensor:
    """(…,) nats: the mean of both Kullback-Leibler divergences between the distributions of (…, n_out) logits; with
    `sigmoid` those of each output alone, summed.

    KL(p, q) + KL(q, p) is the sum of (p - q) (log p - log q), in which normalisers, being equal for all outputs of a
    row, cancel: p - q sums to 0. So logits take the place of logarithms; for a sigmoid log(p / (1 - p)) does.
    """
    p, q = (logits.sigmoid(), other.sigmoid()) if sigmoid else (logits.softmax(-1), other.softmax(-1))
    return ((p - q) * (logits - other)).sum(-1) / 2


def token_divergence(logits: Tensor, other: Tensor, targets: Sequence[Any]) -> Tensor:
    """`divergence`, mean over the tokens that `token_loss` counts; 0 where none does."""
    counted = _wanted(logits, targets) != IGNORED
    return divergence(logits[counted], other[counted]).sum() / counted.sum().clamp(min=1)


def _wanted(logits: Tensor, targets: Sequence[Any]) -> Tensor:
    """(rows, seq) targets, padded with what no loss counts."""
    import torch

    wanted = torch.full(logits.shape[:2], IGNORED)
    for row, target in enumerate(targets):
        wanted[row, : len(target)] = torch.from_numpy(target)
    return wanted.to(logits.device)
