"""A trunk's pass as one flat list of operations. Knows no family and no heads.

`torch.export` follows one pass over tokens that lie end to end, of any number; its graph is run as plain Python,
without the modules' own overhead, which for a short request is more than the arithmetic. Two things stay outside of the
graph and are called from it: the linear layers, and the attention, which a `Layout` tells which tokens see which.

Whoever captures proves the result against the trunk itself; where that fails, or a trunk cannot be exported, its
modules go on being called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtserve.backends.flat import Layout, Rectangle
from mtserve.backends.int8 import Int8Linear
from mtserve.backends.joining import Joining
from mtserve.backends.linears import PackedLinear
from mtserve.backends.pasts import Pasts
from mtserve.trunk import WORD_TYPE_FAMILIES, inputs_of

_SAMPLE = 24  # tokens of the pass that is followed; any number that no size of a model is likely to be


class _Leaf(nn.Module):
    """Stands where a linear layer stood while a pass is followed."""

    def __init__(self, number: int, layer: nn.Module) -> None:
        super().__init__()
        self.number, self.width = number, int(cast("Any", layer).out_features)
        self.layer = [layer]  # in a list, so that it is no module of the trunk

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", _operators()[0](x, self.number, self.width))


class _Spot:
    """The layout while a pass is followed: counts the calls, a layer of the trunk each."""

    def __init__(self) -> None:
        self.calls = 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        self.calls += 1
        return cast("Tensor", _operators()[1](query, key, value, self.calls - 1, scale, causal, window))


@cache
def _operators() -> tuple[Any, Any]:
    """Operators that only stand in a graph: of a linear layer by its number, and of attention by its layer."""

    @torch.library.custom_op("mtserve::linear", mutates_args=())
    def linear(x: Tensor, number: int, width: int) -> Tensor:
        raise NotImplementedError

    @torch.library.custom_op("mtserve::attend", mutates_args=())
    def attend(
        query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float | None, causal: bool, window: int | None
    ) -> Tensor:
        raise NotImplementedError

    linear.register_fake(lambda x, number, width: x.new_empty(*x.shape[:-1], width))
    attend.register_fake(lambda query, key, value, *_: query.new_empty(query.shape[1], query.shape[0], value.shape[2]))
    return torch.ops.mtserve.linear, torch.ops.mtserve.attend


class _Pass(nn.Module):
    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, ids: Tensor, type_ids: Tensor, positions: Tensor) -> Tensor:
        if self.trunk.config.model_type in WORD_TYPE_FAMILIES:
            words = self.trunk.get_input_embeddings()
            more = words(type_ids) * (type_ids > 0)[:, None]  # no branch on what the types are
            inputs: dict[str, Any] = {"inputs_embeds": (words(ids) + more)[None], "use_cache": False}
        else:
            inputs = inputs_of(self.trunk, ids[None], type_ids[None])
        output = self.trunk(position_ids=positions[None], layout=_Spot(), **inputs)
        return cast("Tensor", output.last_hidden_state[0])


def set_aside_(trunk: nn.Module) -> list[_Leaf]:
    """Put leaves in the place of a trunk's linears (the same one for the same layer)."""
    leaves: dict[int, _Leaf] = {}
    for owner in list(trunk.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, (PackedLinear, Int8Linear)):
                setattr(owner, name, leaves.setdefault(id(layer), _Leaf(len(leaves), layer)))
    return list(leaves.values())


def put_back_(trunk: nn.Module, *, but: Sequence[int] = ()) -> None:
    """Put the linears back, and let go of those of the numbers `but`."""
    for owner in list(trunk.modules()):
        for name, leaf in list(owner.named_children()):
            if isinstance(leaf, _Leaf):
                if leaf.number in but:
                    leaf.layer.clear()
                else:
                    setattr(owner, name, leaf.layer[0])


class Captured:
    """A captured pass.

    used   numbers of the leaves whose layers it has taken over
    """

    def __init__(self, run: Callable[..., Tensor], used: Sequence[int]) -> None:
        self._run, self.used = run, used

    def __call__(
        self, ids: Tensor, type_ids: Tensor, positions: Tensor, layout: Layout, pasts: Pasts | None = None
    ) -> Tensor:
        """Last hidden states (tokens, hidden) of tokens that lie end to end; what is kept goes into `pasts`."""
        return self._run(ids, type_ids, positions, layout, pasts)


def capture(trunk: PreTrainedModel, leaves: Sequence[_Leaf]) -> Captured:
    """Follow a pass of a trunk whose linears were set aside.

    Raises whatever `torch.export` raises for a trunk whose pass depends on its data.
    """
    import torch.export

    _operators()
    sample = torch.arange(_SAMPLE) % trunk.config.vocab_size
    any_number = {0: torch.export.Dim.DYNAMIC}
    quiet = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            followed = torch.export.export(
                _Pass(trunk),
                (sample, torch.zeros_like(sample), torch.arange(_SAMPLE)),
                dynamic_shapes=(any_number, any_number, any_number),
                strict=False,
            )
    finally:
        quiet.setLevel(level)
    module = followed.module(check_guards=False)
    return Captured(*Joining(module, [leaf.layer[0] for leaf in leaves], _attend).joined())


def _attend(
    layout: Layout,
    pasts: Pasts | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    if pasts is not None:
        keys, values = pasts.update(key[None], value[None], layer)
        key, value = (keys, values) if isinstance(layout, Rectangle) else (keys[0], values[0])
    return layout.attend(query, key, value, scale=scale, causal=causal, window=window)
