"""A followed pass made short: real layers in it, and neighbouring operations joined. Knows no family and no heads.

Joined are, for oneDNN's layers: linears of the same input (query, key and value; gate and up) into one; a linear with
the activation or the sum behind it. What is not understood is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from types import BuiltinFunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from mtserve.backends.int8 import Int8Linear
from mtserve.backends.linears import PackedLinear, together

_METHODS = frozenset({"view", "expand", "contiguous"})  # that tensors have and `torch` has not


class Joining:
    """One graph on its way from what was followed to what is run.

    layers   what computes in the place of `mtserve::linear` of each number
    attend   what is called in the place of `mtserve::attend`, with two more arguments, in front, of the run graph
    """

    def __init__(self, module: fx.GraphModule, layers: Sequence[nn.Module], attend: Callable[..., Tensor]) -> None:
        self.module, self.graph, self.layers, self.attend = module, module.graph, layers, attend
        self.ops = torch.ops.aten
        self.joints: dict[tuple[int, ...], PackedLinear] = {}

    def joined(self) -> tuple[Callable[..., Tensor], list[int]]:
        """What runs the graph, and the numbers of the layers in it."""
        self._clean()
        used = sorted({cast("int", node.args[1]) for node in self._linears()})
        self._layers()
        self._attention()
        self._bind()
        self.graph.eliminate_dead_code()
        self.graph.set_codegen(fx.graph.CodeGen())
        self._output()
        constants = self._constants()
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        made = fx.GraphModule(self.module, self.graph)
        return partial(made.forward, *constants), used  # not through the wrapper around a module's call

    def _output(self) -> None:
        """The one output by itself, not in a tuple."""
        (node,) = (node for node in self.graph.nodes if node.op == "output")
        ((only,),) = node.args
        node.args = (only,)

    def _constants(self) -> list[Tensor]:
        """Tensors of the graph as its first arguments: finding them by their names costs more than using them."""
        found: dict[str, tuple[Tensor, fx.Node]] = {}
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        for node in [node for node in self.graph.nodes if node.op == "get_attr"]:
            name = cast("str", node.target)
            if name not in found:
                with self.graph.inserting_before(first):
                    found[name] = attrgetter(name)(self.module), self.graph.placeholder(f"constant_{len(found)}")
            node.replace_all_uses_with(found[name][1])
            self.graph.erase_node(node)
        return [tensor for tensor, _ in found.values()]

    def _linears(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.target is torch.ops.mtserve.linear.default]

    def _bind(self) -> None:
        """Operators as PyTorch's own functions and methods call them, at a third of the cost of a call by name."""
        for node in list(self.graph.nodes):
            if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
                continue
            name = node.target._schema.name.removeprefix("aten::")
            if isinstance(bound := getattr(torch, name, None), BuiltinFunctionType):
                node.target = bound
            elif name in _METHODS:
                node.op, node.target = "call_method", name

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
        return self.layers[cast("int", node.args[1])]

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
        named: dict[str, Any] = {}
        if isinstance(layer, (PackedLinear, Int8Linear)) and len(node.users) == 1:
            (user,) = node.users
            if (activation := _activation(user)) is not None:
                last, function, named = user, _activated, activation
            elif (other := _summand(user, node)) is not None:
                last, function, more = user, _added, (other,)
        with self.graph.inserting_before(last):
            if isinstance(layer, PackedLinear):
                new = self.graph.call_function(function, (x, *self._tensors(layer), *more), named)
            else:
                new = self.graph.call_module(self._attribute(layer), (x, *more), named)
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for done in dict.fromkeys((last, node)):
            self.graph.erase_node(done)

    def _tensors(self, layer: PackedLinear) -> tuple[fx.Node, fx.Node | None]:
        name = self._attribute(layer)
        bias = None if layer.bias is None else self.graph.create_node("get_attr", f"{name}.bias")
        return self.graph.create_node("get_attr", f"{name}.packed"), bias

    def _attention(self) -> None:
        """What keeps rows apart, and what is kept of them, are given to every run."""
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            pasts = self.graph.placeholder("pasts")
        with self.graph.inserting_after(last):
            layout = self.graph.placeholder("layout")
        for node in list(self.graph.nodes):
            if node.target is torch.ops.mtserve.attend.default:
                with self.graph.inserting_before(node):
                    new = self.graph.call_function(self.attend, (layout, pasts, *node.args))
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)


def _activation(node: fx.Node) -> dict[str, str] | None:
    """An activation's name and algorithm, as oneDNN has them."""
    if node.target is torch.ops.aten.gelu.default:
        return {"activation": "gelu", "algorithm": str(node.kwargs.get("approximate", "none"))}
    if node.target is torch.ops.aten.relu.default:
        return {"activation": "relu", "algorithm": ""}
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


def _activated(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str, algorithm: str) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, activation, [], algorithm))


def _added(x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, "add"))
