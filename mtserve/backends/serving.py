"""A model as it computes in one profile: its trunk without padding where the family allows it. Knows no rows.

The trunk that serves is another tree of modules over the same parameters, with a config of its own: the attention that
is set there, packed weights and another precision leave the model as it was, so that it can go on training. Where the
weights may change (`follow`), nothing is copied, so that the tree sees the change.

What a trunk can do is shown and not looked up in a table: rows end to end must give the states of the model's own
padded pass, and a captured pass those of the modules. Where that fails, the slower way is taken, and the log says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtserve.backends import flat, int8
from mtserve.backends.captured import Captured, capture, put_back_, set_aside_
from mtserve.backends.linears import Lookup, PackedLinear, can_pack, look_up_, pack_
from mtserve.backends.pasts import Pasts
from mtserve.backends.proof import Proof, difference
from mtserve.heads import Head
from mtserve.model import Model
from mtserve.trunk import accepted, first_position, inputs_of

logger = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
_FAILURES = (
    *(AssertionError, AttributeError, IndexError, KeyError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
_CAPTURE_TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.05}
"""How far a captured pass may be from the modules': joined layers round once where two did, and an integer may fall on
the other side of a half."""
_HALF_TOLERANCE = 0.05


class Served:
    """A trunk that serves, and its heads.

    trunk     the tree of modules that computes
    flat      whether it takes rows end to end; else padded ones
    captured  its pass as a graph, where that was asked for and could be made
    dtype     of the states between its layers

    Raises SetupError for a profile that this hardware cannot run.
    """

    def __init__(self, model: Model, profile: str, *, follow: bool = False, capture: bool = False) -> None:
        self.model, self.device = model, model.trunk.device
        self._of_model = model.trunk.dtype  # asking a model for it looks through its parameters
        self.dtype = self._of_model if follow else DTYPES[profile]
        self.first_position = first_position(model.trunk.config)
        self.captured: Captured | None = None
        self._follow = follow
        self._packed: dict[int, PackedLinear] = {}
        self._casts: dict[int, nn.Parameter] = {}
        self._heads: dict[str, Head] = {}
        self._varlen = False
        proof = Proof(model)
        self.trunk = _copy(model.trunk).eval()
        self.flat = self._prove(proof)
        if not follow:
            if profile == "int8":
                _quantize_(self.trunk, model)
            self._change(self.trunk, {})
            if capture and self.flat and can_pack(self.dtype, self.device):
                self._capture(proof, _CAPTURE_TOLERANCE[profile])
        if self.flat and self.like.is_cuda and self.dtype in flat.HALVES:
            self._varlen = self._prove_varlen(proof)

    @property
    def like(self) -> Tensor:
        """An empty tensor in the precision and on the device of the states."""
        return torch.empty((), dtype=self.dtype, device=self.device)

    def filling(self, lengths: Sequence[int]) -> int:
        """Tokens of no row that a pass over fresh rows has at its end."""
        return 0 if self.device.type != "cpu" else flat.filling(sum(lengths))

    def layout(self, lengths: Sequence[int], fill: int = 0) -> flat.Layout:
        """How fresh rows lie, longest first, before the tokens of no row."""
        return flat.fresh(lengths, self.like.device if self._varlen else None, fill=fill)

    def encode(
        self, ids: Tensor, type_ids: Tensor, positions: Tensor, layout: flat.Layout, pasts: Pasts | None = None
    ) -> Tensor:
        """One pass over tokens that lie end to end, all (tokens,) int64: last hidden states (tokens, hidden). What is
        kept goes into `pasts`."""
        if self.captured is not None:
            return self.captured(ids, type_ids, positions, layout, pasts)
        inputs = inputs_of(self.trunk, ids[None], type_ids[None])
        if pasts is not None:
            inputs |= {"past_key_values": pasts, "use_cache": True}
        output = self.trunk(position_ids=positions[None], layout=layout, **inputs)
        return cast("Tensor", output.last_hidden_state)[0]

    def pooled(self, first: Tensor) -> Tensor | None:
        """The trunk's own pooler over the states of rows' first tokens: (rows, hidden) to (rows, hidden). A pooler is a
        module over (rows, seq, hidden), or as in ALBERT a linear layer with its activation beside it."""
        pooler = getattr(self.trunk, "pooler", None)
        if not isinstance(pooler, nn.Module):
            return None
        if (activation := getattr(self.trunk, "pooler_activation", None)) is not None:
            return cast("Tensor", activation(pooler(first)))
        return cast("Tensor", pooler(first[:, None]))

    def head(self, task: str) -> Head:
        """A task's head; one over the whole vocabulary as the profile has it, since reading its matrix is a large part
        of a step, others as they are in the model."""
        if self._follow or self.model.specs[task].architecture != "causal_lm":
            return self.model.head(task)
        if task not in self._heads:
            self._heads[task] = _copy(self.model.head(task))
            self._change(self._heads[task], self._packed)
        return self._heads[task]

    def forget(self, task: str) -> None:
        """Free what was made for a head that leaves the model; what it shares with the trunk stays."""
        kept = {id(tensor) for tensor in self.model.trunk.parameters()}
        for own in self.model.head(task).parameters():
            if id(own) not in kept:  # else a later tensor at this place would be taken for it
                self._packed.pop(id(own), None)
                self._casts.pop(id(own), None)
        self._heads.pop(task, None)

    def head_dtype(self, task: str) -> torch.dtype:
        """Precision of the states that a head takes."""
        return self.dtype if task in self._heads else self._of_model

    def _change(self, module: nn.Module, packed: dict[int, PackedLinear]) -> None:
        """Put layers as the profile has them in the place of the model's; `packed` are those made before."""
        if can_pack(self.dtype, self.device):
            pack_(module, self.dtype, packed)
        if self.dtype != self._of_model:
            if self.device.type == "cpu" and self.flat:
                look_up_(module, self.dtype)
            _cast_(module, self.dtype, self._casts)

    def _capture(self, proof: Proof, tolerance: float) -> None:
        """Make the pass a graph, if that can be made and gives what the modules give; it takes over their layers."""
        wanted = proof.states(self.encode, self.layout)
        leaves = set_aside_(self.trunk)
        used: Sequence[int] = ()
        try:
            self.captured = capture(self.trunk, leaves)
            off = difference(proof.states(self.encode, self.layout), wanted)
            reason = None if off <= tolerance else f"states differ by {off:.1e}"
            used = self.captured.used
        except Exception as error:  # an export fails in many ways, and none of them matters but for speed
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if reason is not None:
            self.captured, used = None, ()
            logger.warning("the pass of %s is not captured: %s", self.trunk.config.model_type, reason)
        put_back_(self.trunk, but=used)

    def _prove(self, proof: Proof) -> bool:
        """Whether the trunk takes rows end to end; it is left padding them if not."""
        trunk = self.trunk
        reason = "its attention is not called through Transformers' interface"
        if trunk._can_set_attn_implementation() and "position_ids" in accepted(trunk):
            flat.register()
            try:
                trunk.set_attn_implementation(flat.NAME)
                off = self._flat_error(proof)
                if off <= max(1e-4, 8 * torch.finfo(trunk.dtype).eps):
                    return True
                reason = f"states differ by {off:.1e}"
            except _FAILURES as error:
                reason = f"{type(error).__name__}: {error}"
        logger.warning("rows of %s are padded to the longest of a batch: %s", trunk.config.model_type, reason)
        self.trunk = _copy(self.model.trunk).eval()
        return False

    @torch.inference_mode()
    def _flat_error(self, proof: Proof) -> float:
        found, wanted = proof.states(self.encode, self.layout), proof.of_model()
        if proof.padded.pooled is not None:
            pooled = self.pooled(found[0][proof.starts])
            assert pooled is not None, "its pooler cannot be called for rows alone"
            found, wanted = [*found, pooled], [*wanted, proof.padded.pooled]
        return difference(found, wanted)

    def _prove_varlen(self, proof: Proof) -> bool:
        """Whether the variable-length kernel of a GPU gives what one call a length does, in half precision."""
        wanted = proof.states(self.encode, self.layout)
        self._varlen = True
        try:
            off = difference(proof.states(self.encode, self.layout), wanted)
            reason = f"states differ by {off:.1e}"
        except _FAILURES as error:
            off, reason = float("inf"), f"{type(error).__name__}: {error}"
        if off > _HALF_TOLERANCE:
            logger.warning("attention of %s takes a call a length: %s", self.trunk.config.model_type, reason)
        return off <= _HALF_TOLERANCE


def _quantize_(trunk: PreTrainedModel, model: Model) -> None:
    """Put 8-bit linears into the layers of a trunk that serves, made by a copy whose attention is still its own."""
    made = _copy(model.trunk).eval()
    for name in int8.quantize_(made):
        trunk.set_submodule(name, made.get_submodule(name))


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
        for name, old in list(inner.named_parameters(recurse=False)):
            if old.is_floating_point() and old.dtype != dtype:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(old.detach().to(dtype), requires_grad=False)
                setattr(inner, name, made[id(old)])
