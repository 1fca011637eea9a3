"""Mixout (Lee et al., 2020): at every step of a training a share of the trunk's numbers is what it was before it.

A matrix w that was u is, in a pass in training mode, u + dropout(w - u): each number has with probability `share` its
old value, else one further off, so that w is the mean. The trunk stays near the one that it came from, where dropout
keeps a network near nothing. Invariants (tests/training/test_regularisers.py holds them):

1. In evaluation mode every matrix is w, and after `unmix` the trunk is as if it had never been mixed: names, modules.
2. All uses of a matrix in one pass see the same numbers (`cached` in the learner's pass), and another pass others.
3. What is saved to resume from is w alone; u is the trunk that the resumed run opens.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from mtserve.errors import ConfigError


class _Mixed(nn.Module):
    def __init__(self, before: Tensor, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("before", before.detach().clone(), persistent=False)
        self.before: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        return self.before + functional.dropout(weight - self.before, self.share)


def mix(trunk: nn.Module, share: float) -> None:
    """Mix the matrices of the trunk's linear layers that are trained. Takes their memory once more.

    Raises ConfigError where there are none.
    """
    from transformers.pytorch_utils import Conv1D

    layers = [m for m in trunk.modules() if isinstance(m, nn.Linear | Conv1D) and m.weight.requires_grad]
    if not layers:
        raise ConfigError(f"training.mixout: {type(trunk).__name__} has no linear layer that is trained")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Mixed(layer.weight, share))


def unmix(trunk: nn.Module) -> None:
    """Leave the matrices as they are in evaluation mode."""
    for module in [*trunk.eval().modules()]:
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
