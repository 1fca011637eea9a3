"""A trunk's pass as one flat list of operations, with neighbouring ones joined. Knows no family and no heads.

`torch.export` follows one pass over tokens that lie end to end, of any number; its graph is run as plain Python,
without the modules' own overhead, which for a short request is more than the arithmetic. Two things stay outside of the
graph and are called from it: the linear layers, and the attention, which a `Layout` tells which tokens see which.

Joined are, for oneDNN's layers: linears of the same input (query, key and value; gate and up) into one; a linear with
the activation or the sum behind it. What is not understood is left as it is. Whoever captures proves the result against
the trunk itself; where that fails, or a trunk cannot be exported, its modules go on being called.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from mtserve.backends.flat import Layout, Rectangle
from mtserve.backends.int8 import Int8Linear
from mtserve.backends.linears import PackedLinear, together
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

    def __init__(self, graph: fx.GraphModule, used: Sequence[int]) -> None:
        self._run, self.used = graph.forward, used  # without the wrapper around a module's call

    def __call__(
        self, ids: Tensor, type_ids: Tensor, positions: Tensor, layout: Layout, pasts: Pasts | None = None
    ) -> Tensor:
        """Last hidden states (tokens, hidden) of tokens that lie end to end; what is kept goes into `pasts`."""
        return cast("Tensor", self._run(ids, type_ids, positions, layout, pasts)[0])


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
    return _Joining(module, leaves).joined()


class _Joining:
    """One graph on its way from what was followed to what is run."""

    def __init__(self, module: fx.GraphModule, leaves: Sequence[_Leaf]) -> None:
        self.module, self.graph, self.leaves = module, module.graph, leaves
        self.ops = torch.ops.aten
        self.joints: dict[tuple[int, ...], PackedLinear] = {}

    def joined(self) -> Captured:
        self._clean()
        used = sorted({cast("int", node.args[1]) for node in self._linears()})
        self._layers()
        self._attention()
        self.graph.eliminate_dead_code()
        self.graph.set_codegen(fx.graph.CodeGen())
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        return Captured(fx.GraphModule(self.module, self.graph), used)

    def _linears(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.target is torch.ops.mtserve.linear.default]

    def _clean(self) -> None:
        """Take out what does nothing in evaluation: dropout, assertions about sizes."""
        for node in list(self.graph.nodes):
            name = str(node.target)
            if node.target is self.ops.dropout.default:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
            elif name.startswith(("aten._assert", "aten.sym_constrain")) or (
                node.op == "call_module" and name == "_guards_fn"
            ):
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()

    def _layers(self) -> None:
        """Real layers for the leaves; packed ones of the same input as one."""
        alike: dict[fx.Node, list[fx.Node]] = {}
        for node in self._linears():
            alike.setdefault(cast("fx.Node", node.args[0]), []).append(node)
        for nodes in alike.values():
            layers = [self._layer(node) for node in nodes]
            packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
            if len(nodes) > 1 and len({id(layer) for layer in packed}) == len(nodes):
                self._split(nodes, self._joint(packed))
            else:
                for node, layer in zip(nodes, layers, strict=True):
                    self._one(node, layer)

    def _layer(self, node: fx.Node) -> nn.Module:
        return self.leaves[cast("int", node.args[1])].layer[0]

    def _joint(self, layers: Sequence[PackedLinear]) -> PackedLinear:
        """One layer for several; the same again where the trunk goes through them again."""
        at = tuple(id(layer) for layer in layers)
        if at not in self.joints:
            self.joints[at] = together(layers)
        return self.joints[at]

    def _attribute(self, layer: nn.Module) -> str:
        for name, known in self.module.named_children():
            if known is layer:
                return name
        name = f"layer_{len(list(self.module.named_children()))}"
        self.module.add_module(name, layer)
        return name

    def _split(self, nodes: Sequence[fx.Node], layer: PackedLinear) -> None:
        """One call for linears of the same input."""
        sizes = [cast("int", node.args[2]) for node in nodes]
        with self.graph.inserting_before(nodes[0]):
            whole = self.graph.call_function(_plain, (nodes[0].args[0], *self._tensors(layer)))
            parts = self.graph.call_function(self.ops.split_with_sizes.default, (whole, sizes, -1))
            for at, node in enumerate(nodes):
                part = self.graph.call_function(operator.getitem, (parts, at))
                part.meta = dict(node.meta)
                node.replace_all_uses_with(part)
        for node in nodes:
            self.graph.erase_node(node)

    def _one(self, node: fx.Node, layer: nn.Module) -> None:
        """One call for a linear, and for the activation or the sum behind it."""
        x, last = node.args[0], node
        function: Callable[..., Tensor] = _plain
        more: tuple[Any, ...] = ()
        if isinstance(layer, PackedLinear) and len(node.users) == 1:
            (user,) = node.users
            if (activation := _activation(user)) is not None:
                last, function, more = user, _activated, activation
            elif (other := _summand(user, node)) is not None:
                last, function, more = user, _added, (other,)
        with self.graph.inserting_before(last):
            if isinstance(layer, PackedLinear):
                new = self.graph.call_function(function, (x, *self._tensors(layer), *more))
            else:
                new = self.graph.call_module(self._attribute(layer), (x,))
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for done in dict.fromkeys((last, node)):
            self.graph.erase_node(done)

    def _tensors(self, layer: PackedLinear) -> tuple[fx.Node, fx.Node | None]:
        name = self._attribute(layer)
        bias = None if layer.bias is None else self.graph.create_node("get_attr", f"{name}.bias")
        return self.graph.create_node("get_attr", f"{name}.packed"), bias

    def _attention(self) -> None:
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            pasts = self.graph.placeholder("pasts")
        with self.graph.inserting_after(last):
            layout = self.graph.placeholder("layout")
        for node in list(self.graph.nodes):
            if node.target is torch.ops.mtserve.attend.default:
                with self.graph.inserting_before(node):
                    new = self.graph.call_function(_attend, (layout, pasts, *node.args))
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)


def _activation(node: fx.Node) -> tuple[str, str] | None:
    """oneDNN's name and algorithm of an activation."""
    if node.target is torch.ops.aten.gelu.default:
        return "gelu", str(node.kwargs.get("approximate", "none"))
    if node.target is torch.ops.aten.relu.default:
        return "relu", ""
    return None


def _summand(node: fx.Node, linear: fx.Node) -> fx.Node | None:
    """What a node adds to a linear's output, if it does just that to something of the same shape."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return None
    others = [arg for arg in node.args if arg is not linear]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    shapes = {str(one.meta["val"].shape) for one in (node, linear, others[0]) if "val" in one.meta}
    return others[0] if len(shapes) == 1 and "val" in others[0].meta else None


def _plain(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], ""))


def _activated(x: Tensor, packed: Tensor, bias: Tensor | None, name: str, algorithm: str) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, name, [], algorithm))


def _added(x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, "add"))


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
