"""Layers as a processor reads them best: packed linears, and embeddings that are looked up in the file's own precision.

Knows no family: linears are found by their class (`nn.Linear`, and the `Conv1D` that GPT-2 has in its place).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN's kernels read them, so that no call has to rearrange them.

    weight (out, in), bias (out,); x (…, in) in the layer's precision to (…, out). The weight that it was made of is
    remembered, not copied, so that several can be made one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.source = dtype, (weight.detach(), None if bias is None else bias.detach())
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return out


class Lookup(nn.Module):
    """An embedding whose rows are turned into another precision when they are looked up, so that no second table is
    made; the same numbers as a table in that precision."""

    def __init__(self, weight: Tensor, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.padding_idx, self.dtype = weight, padding_idx, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight).to(self.dtype)


def together(layers: Sequence[PackedLinear]) -> PackedLinear:
    """One layer that gives the outputs of several of the same input, one after another."""
    weights, biases = zip(*(layer.source for layer in layers), strict=True)
    bias = None
    if any(one is not None for one in biases):
        given = zip(weights, biases, strict=True)
        bias = torch.cat([weight.new_zeros(len(weight)) if one is None else one for weight, one in given])
    made = PackedLinear(torch.cat(weights), bias, layers[0].dtype)
    made.source = (torch.empty(0), None)  # the joined copy is not needed again
    return made


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has kernels for this precision on this processor."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, layer) of every linear layer under a module."""
    for owner in list(module.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer) in (nn.Linear, Conv1D):
                yield owner, name, layer


def weight_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(out, in) weight and (out,) bias of a linear layer."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    return weight.t() if isinstance(layer, Conv1D) else weight, bias


def pack_(module: nn.Module, dtype: torch.dtype, made: dict[int, PackedLinear]) -> None:
    """Put packed layers of a precision in the place of all linear ones under a module. `made` are those of before, by
    the weight's id, so that one weight is packed once."""
    for owner, name, layer in linears(module):
        weight, bias = weight_of(layer)
        at = id(layer.get_parameter("weight"))
        if at not in made:
            made[at] = PackedLinear(weight, bias, dtype)
        setattr(owner, name, made[at])


def look_up_(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the embeddings under a module give their rows in a precision."""
    for owner in list(module.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer) is nn.Embedding and layer.max_norm is None:
                setattr(owner, name, Lookup(layer.weight, layer.padding_idx, dtype))
