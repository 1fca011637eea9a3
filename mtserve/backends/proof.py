"""Random rows that show whether a pass gives what another one gives. Knows no profiles and no heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mtserve.backends import flat
from mtserve.heads import TrunkStates
from mtserve.model import Model
from mtserve.trunk import first_position, max_length

Encode = Callable[[Tensor, Tensor, Tensor, flat.Layout], Tensor]
"""A pass over tokens end to end: ids, type ids and positions (tokens,), and the layout of rows, to (tokens, hidden)."""

_LENGTHS = (12, 7, 7, 3)  # equal ones, and a sum that no layout takes for a round number
_LONGEST_WINDOW = 512  # a window up to this is tried by a row that is longer


class Proof:
    """Rows of a model's trunk: a few of different lengths, one longer than its window, and one token alone."""

    def __init__(self, model: Model) -> None:
        self._model = model
        config = model.trunk.config
        window = getattr(config, "sliding_window", None) or 0
        longest = max_length(config) or window + 9
        longer = [min(window + 9, longest)] if 0 < window <= _LONGEST_WINDOW else []
        self.lengths = sorted([*(min(n, longest) for n in _LENGTHS), *longer], reverse=True)
        drawn = np.random.default_rng(0).integers(0, config.vocab_size, sum(self.lengths))
        pad = config.pad_token_id or 0
        self._pad, device = pad, model.trunk.device
        ids = np.where(drawn == pad, (pad + 1) % config.vocab_size, drawn)  # families count positions by what is no pad
        self._ids = torch.from_numpy(ids).to(device)
        self._positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device) + first_position(config)
        self.starts = torch.tensor(np.cumsum([0, *self.lengths[:-1]]), device=device)

    def states(self, encode: Encode, layout: Callable[[Sequence[int]], flat.Layout]) -> list[Tensor]:
        """(tokens, hidden) of all rows, and (1, hidden) of the first token as a row of its own."""
        found = []
        with torch.inference_mode():
            for count, lengths in ((len(self._ids), self.lengths), (1, [1])):
                ids = self._ids[:count]
                found.append(encode(ids, torch.zeros_like(ids), self._positions[:count], layout(lengths)))
        return found

    @cached_property
    def padded(self) -> TrunkStates:
        """What the model's own pass gives for the rows, padded at the right."""
        rows = list(torch.split(self._ids, self.lengths))
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        training = self._model.trunk.training
        self._model.trunk.eval()
        with torch.inference_mode():
            states = self._model.states(ids, mask, torch.zeros_like(ids))
        self._model.trunk.train(training)
        return states

    def of_model(self) -> list[Tensor]:
        """The states of `padded` in the form of `states`, which a pass without padding must give."""
        every = self.padded.hidden[self.padded.mask.bool()]
        with torch.inference_mode():
            ids = self._ids[None, :1]
            alone = self._model.states(ids, torch.ones_like(ids), torch.zeros_like(ids)).hidden[0]
        return [every, alone]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of a pair, over the largest number that was wanted; infinite for what is no number."""
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(found, wanted, strict=True)]
    if not all(torch.isfinite(a).all() for a, _ in pairs):
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
