"""A model as it computes in one profile: its trunk without padding where the family allows it. Knows no rows.

The trunk that serves is another tree of modules over the same parameters, with a config of its own: the attention that
is set there, packed weights and another precision leave the model as it was, so that it can go on training. Where the
weights may change (`follow`), nothing is copied, so that the tree sees the change.

That rows lie end to end is proven and not looked up in a table: random rows must give the states of the padded pass.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mtserve.backends import flat, int8
from mtserve.backends.linears import Lookup, PackedLinear, can_pack, look_up_, pack_
from mtserve.heads import Head
from mtserve.model import Model
from mtserve.trunk import accepted, first_position, inputs_of, max_length

logger = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
_FAILURES = (
    *(AssertionError, AttributeError, IndexError, KeyError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
_PROOF = (7, 3, 12, 7)  # lengths of the random rows; of two there is a pair
_LONGEST_WINDOW = 512  # a window up to this is proven by a row that is longer


class Served:
    """A trunk that serves, and its heads.

    trunk   the tree of modules that computes
    flat    whether it takes rows end to end; else padded ones
    dtype   of the states between its layers
    """

    def __init__(self, model: Model, profile: str, *, follow: bool = False) -> None:
        self.model, self.device = model, model.trunk.device
        self.dtype = model.trunk.dtype if follow else DTYPES[profile]
        self.trunk, self.flat = _proven(model)
        self._follow = follow
        self._packed: dict[int, PackedLinear] = {}
        self._casts: dict[int, nn.Parameter] = {}
        self._heads: dict[str, Head] = {}
        if not follow:
            if profile == "int8":
                int8.quantize_(self.trunk)
            self._change(self.trunk)

    def head(self, task: str) -> Head:
        """A task's head: one over the whole vocabulary as the profile has it, since reading its matrix is a large part
        of a step, others as they are in the model."""
        if self._follow or self.model.specs[task].architecture != "causal_lm":
            return self.model.head(task)
        if task not in self._heads:
            self._heads[task] = _copy(self.model.head(task))
            self._change(self._heads[task])
        return self._heads[task]

    def head_dtype(self, task: str) -> torch.dtype:
        """Precision of the states that a head takes."""
        return self.dtype if task in self._heads else self.model.trunk.dtype

    def pooled(self, first: Tensor) -> Tensor | None:
        """The trunk's own pooler over the states of rows' first tokens: (rows, hidden) to (rows, hidden)."""
        return _pooled(self.trunk, first)

    def first_position(self) -> int:
        return first_position(self.trunk.config)

    def _change(self, module: nn.Module) -> None:
        """Put layers as the profile has them in the place of the model's."""
        on_cpu = self.device.type == "cpu"
        if on_cpu and can_pack(self.dtype):
            pack_(module, self.dtype, self._packed)
        if self.dtype != self.model.trunk.dtype:
            if on_cpu and self.flat:
                look_up_(module, self.dtype)
            _cast_(module, self.dtype, self._casts)


def _proven(model: Model) -> tuple[PreTrainedModel, bool]:
    """A trunk that serves, and whether it was shown to take rows end to end."""
    made = _copy(model.trunk).eval()
    off, reason = np.inf, "its attention is not called through Transformers' interface"
    if made._can_set_attn_implementation() and "position_ids" in accepted(type(made)):
        flat.register()
        try:
            made.set_attn_implementation(flat.NAME)
            with torch.inference_mode():
                off = _error_of_flat_rows(model, made)
            reason = f"states differ by {off:.1e}"
        except _FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
    if off <= max(1e-4, 8 * torch.finfo(made.dtype).eps):
        return made, True
    logger.warning("rows of %s are padded to the longest of a batch: %s", made.config.model_type, reason)
    return _copy(model.trunk).eval(), False


def _error_of_flat_rows(model: Model, made: PreTrainedModel) -> float:
    """Largest relative difference between states (and pooler outputs) of random rows end to end and padded."""
    config, device = made.config, made.device
    window = getattr(config, "sliding_window", None) or 0
    longer = [min(window + 9, max_length(config) or window + 9)] if 0 < window <= _LONGEST_WINDOW else []
    lengths = sorted([*_PROOF, *longer], reverse=True)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, sum(lengths))
    pad = config.pad_token_id or 0
    ids = torch.from_numpy(np.where(ids == pad, (pad + 1) % config.vocab_size, ids))
    positions = torch.cat([torch.arange(n) for n in lengths]) + first_position(config)
    found = encode(made, ids.to(device), torch.zeros_like(ids).to(device), positions.to(device), lengths=lengths)
    rows = ids.split(lengths)
    padded = pad_sequence(list(rows), batch_first=True, padding_value=pad).to(device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    training = model.trunk.training
    model.trunk.eval()
    wanted = model.states(padded, mask, torch.zeros_like(padded))
    model.trunk.train(training)
    pairs = [(found, wanted.hidden[mask.bool()])]
    if wanted.pooled is not None:
        starts = torch.tensor(np.cumsum([0, *lengths[:-1]]), device=device)
        pooled = _pooled(made, found[starts])
        assert pooled is not None, "the pooler cannot be called for rows alone"
        pairs.append((pooled, wanted.pooled))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def encode(
    trunk: PreTrainedModel,
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    *,
    lengths: Sequence[int] = (),
    layout: flat.Layout | None = None,
    **more: Any,
) -> Tensor:
    """One pass over tokens that lie end to end, all (tokens,) int64: last hidden states (tokens, hidden).

    `lengths` of fresh rows, longest first, or a `layout`; `more` is given to the trunk as it is.
    """
    like = torch.empty((), dtype=trunk.dtype, device=ids.device)
    inputs = inputs_of(trunk, ids[None], type_ids[None]) | more
    output = trunk(position_ids=positions[None], layout=layout or flat.fresh(lengths, like), **inputs)
    return cast("Tensor", output.last_hidden_state)[0]


def _pooled(trunk: PreTrainedModel, first: Tensor) -> Tensor | None:
    """A pooler that is a module over (rows, seq, hidden), or ALBERT's linear layer with its activation beside it."""
    pooler = getattr(trunk, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return None
    if (activation := getattr(trunk, "pooler_activation", None)) is not None:
        return cast("Tensor", activation(pooler(first)))
    return cast("Tensor", pooler(first[:, None]))


def _copy(module: _Module) -> _Module:
    """Another tree of modules with the same parameters and buffers, and configs of its own."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _cast_(module: nn.Module, dtype: torch.dtype, made: dict[int, nn.Parameter]) -> None:
    """Replace the parameters under a module by ones of another precision, but for tables that are cast when looked up.
    `made` are those replaced before, so that what was shared is shared again."""
    for inner in module.modules():
        if isinstance(inner, Lookup):
            continue
        for name, old in inner.named_parameters(recurse=False):
            if old.is_floating_point() and old.dtype != dtype:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(old.detach().to(dtype), requires_grad=False)
                setattr(inner, name, made[id(old)])
