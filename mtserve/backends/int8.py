"""Linears in 8-bit integers for inference on a CPU, on its AMX or VNNI units. Knows no tasks and no batches.

Each token has a range of its own, found from its values alone, so no answer depends on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mtserve.errors import SetupError
from mtserve.trunk import max_length

_CAPABILITIES = ("_is_vnni_supported", "_is_amx_tile_supported")
_OPERATORS = ("quantized::embedding_bag_byte_prepack", "onednn::qlinear_prepack", "onednn::qlinear_pointwise")
_BLOCK = 512  # tokens at a time, whose intermediates stay in a cache; fresh memory for all would cost up to half more
_TAIL = 8  # bytes behind a token's integers: its step and its smallest value, both float32
_BALANCE = 0.35  # how much of the spread of input channels the weights take over; measured on MiniLM
_ROWS, _ROW = 8, 64  # random tokens that show how far channels spread


class Int8Linear(nn.Module):
    """A linear of weights in 8 bits, a step for each output, and inputs in 8 bits, a step and an offset for each token.

    With x / smooth = low + step * u, u of 0 … 255, and w * smooth = scale * v, v of -127 … 127, an output is
    step * scale * (v · u) + low * sum(scale * v) + bias, where v · u is exact. It computes in float32 and answers in
    its input's type. All that it holds are plain attributes: nothing stands in a state dict, and no cast or move of
    the trunk reaches it. It has no gradients.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, spread: Tensor | None = None) -> None:
        """`weight` is (out, in), `in` a multiple of 4. `spread` (in,) is the root mean square of each input channel:
        with it, channels that stick out are scaled down and their weights up (SmoothQuant, arXiv 2211.10438)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if self.in_features % 4:
            raise ValueError(f"the inputs of an int8 linear must be a multiple of 4, not {self.in_features}")
        weight = weight.detach().float()
        self._inverse: Tensor | None = None
        if spread is not None:
            smooth = _smooth(weight, spread)  # (in,)
            self._inverse, weight = smooth.reciprocal(), weight * smooth
        self._scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (out,)
        integers = (weight / self._scale[:, None]).round().to(torch.int8)  # (out, in)
        self._sum = integers.sum(1) * self._scale  # (out,)
        self._bias = torch.zeros(self.out_features) if bias is None else bias.detach().float().clone()
        self._zero = torch.zeros(self.out_features, dtype=torch.int32)
        # A token's tail goes through the product too, where it meets zeros: cheaper than a copy without it.
        self._packed = torch.ops.onednn.qlinear_prepack(functional.pad(integers, (0, _TAIL)), None)

    def forward(
        self, x: Tensor, other: Tensor | None = None, *, activation: str | None = None, algorithm: str = "none"
    ) -> Tensor:
        """(…, in) to (…, out). An activation (gelu with its algorithm, or relu) and what is to be added, as `other`,
        are done while a block is in a cache."""
        out = torch.empty((*x.shape[:-1], self.out_features), device=x.device)
        given, into = x.reshape(-1, self.in_features), out.view(-1, self.out_features)  # (tokens, in), (tokens, out)
        more = None if other is None else other.reshape(-1, self.out_features)
        for at in range(0, len(given), _BLOCK):
            block = slice(at, at + _BLOCK)
            found = self._products(given[block], into=into[block])
            if activation == "gelu":
                torch.ops.aten.gelu_.default(found, approximate=algorithm)
            elif activation == "relu":
                found.relu_()
            if more is not None:
                found.add_(more[block])
        return out.to(x.dtype)

    def _products(self, x: Tensor, *, into: Tensor) -> Tensor:
        """(tokens, in) to (tokens, out) float32."""
        given = x.float() if self._inverse is None else x * self._inverse
        tokens = torch.ops.quantized.embedding_bag_byte_prepack(given)  # (tokens, in + tail) uint8
        tails = tokens.view(torch.float32)  # (tokens, in / 4 + 2)
        step, low = tails.narrow(-1, self.in_features // 4, 1), tails.narrow(-1, self.in_features // 4 + 1, 1)
        # Inputs of step 1 and zero point 0, outputs of float32, nothing behind them. Signed inputs, which the operator
        # takes too, have no fast kernel.
        y = torch.ops.onednn.qlinear_pointwise.default(  # (tokens, out)
            *(tokens, 1.0, 0, self._packed, self._scale, self._zero), *(None, 1.0, 0, torch.float32, "none", [], "")
        )
        return torch.addcmul(self._bias, low, self._sum, out=into).addcmul_(y, step)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def obstacle() -> str | None:
    """Why this CPU or this torch has no fast 8-bit linears; None if both have."""
    probes = {name: getattr(torch.cpu, name, None) for name in _CAPABILITIES}
    if missing := [name for name, probe in probes.items() if probe is None]:
        return f"torch {torch.__version__} does not tell what the CPU can do: torch.cpu.{missing[0]} is missing"
    if not any(cast("Any", probe)() for probe in probes.values()):
        return "the CPU has neither VNNI units of AVX-512 nor AMX units"
    if not torch._C._has_mkldnn:
        return f"torch {torch.__version__} is built without oneDNN"
    for operator in _OPERATORS:
        library, name = operator.split("::")
        if not hasattr(getattr(torch.ops, library), name):
            return f"torch {torch.__version__} has no operator {operator}"
    return None


def supported() -> bool:
    """Whether `quantize_` works here and is worth its loss of accuracy."""
    return obstacle() is None


@torch.no_grad()
def quantize_(trunk: PreTrainedModel, *, keep: Collection[str] = ()) -> list[str]:
    """Replace the linears of a trunk's layers, in place, but for those named in `keep`; returns the names of those
    replaced, in the trunk's order. Their weights are freed.

    Embeddings, poolers and all else outside the layers stay, and so do linears of a width that is no multiple of 4.
    How far the channels of each input spread is taken from one pass over random tokens. Raises SetupError where
    `supported` is false, ValueError if `keep` names what is no such linear.
    """
    if reason := obstacle():
        raise SetupError(f"int8 linears cannot be used: {reason}")
    found = _linears(trunk)
    if unknown := sorted(set(keep) - found.keys()):
        raise ValueError(f"not among the linears of the trunk's layers: {', '.join(unknown)}; they are {[*found]}")
    places = {name: linear for name, linear in found.items() if name not in set(keep)}
    spreads = _spreads(trunk, set(places.values()))
    made: dict[nn.Module, Int8Linear] = {}  # a linear may have several places
    for name, linear in places.items():
        if linear not in made:
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            made[linear] = Int8Linear(weight, linear.bias, spread=spreads.get(linear))
        trunk.set_submodule(name, made[linear])
    return list(places)


def _linears(trunk: nn.Module) -> dict[str, Any]:
    """Linears of the layers by their names. A family's layers are what stands in lists of modules."""
    layers = [name for name, module in trunk.named_modules(remove_duplicate=False) if isinstance(module, nn.ModuleList)]
    return {
        name: module
        for name, module in trunk.named_modules(remove_duplicate=False)
        if type(module) in (nn.Linear, Conv1D)
        and _width(module) % 4 == 0
        and any(name.startswith(f"{layer}.") for layer in layers)
    }


def _width(linear: Any) -> int:
    return int(linear.weight.shape[0 if isinstance(linear, Conv1D) else 1])


def _spreads(trunk: PreTrainedModel, linears: Collection[Any]) -> dict[nn.Module, Tensor]:
    """Root mean square of each input channel of these linears over random tokens; without those that none reached."""
    squares: dict[nn.Module, list[Tensor]] = {linear: [] for linear in linears}

    def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[linear].append(inputs[0].detach().float().square().flatten(0, -2).mean(0))  # (in,)

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    was_training = trunk.training
    trunk.eval()
    try:
        length = min(_ROW, max_length(trunk.config) or _ROW)
        shape, random = (_ROWS, length), torch.Generator().manual_seed(0)
        trunk(input_ids=torch.randint(trunk.config.vocab_size, shape, generator=random))
    finally:
        trunk.train(was_training)
        for hook in hooks:
            hook.remove()
    return {linear: torch.stack(seen).mean(0).sqrt() for linear, seen in squares.items() if seen}


def _smooth(weight: Tensor, spread: Tensor) -> Tensor:
    """What each input channel is divided by, from its spread and from that of its weights (out, in): (in,)."""
    sizes = (spread, weight.square().mean(0).sqrt())
    inputs, weights = (size.clamp(min=max(float(size.mean()), 1e-12) * 1e-2) for size in sizes)
    smooth = inputs**_BALANCE / weights ** (1 - _BALANCE)
    return smooth / smooth.median()
