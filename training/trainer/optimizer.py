"""What an optimizer is given: parameter groups with rates of their own, and which parameters stay as they are.

Every parameter of a model has a place: 0 below the trunk's layers (embeddings), 1 to L in them, L + 1 above them (a
pooler, a final norm), and none in a head. Knows no task, and steps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mtserve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

_OF_THEIR_OWN = ("galore", "apollo", "lomo", "adalomo")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    head_learning_rate: float | None = None,
    layer_decay: float | None = None,
    trunk: str = "trunk",
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with `name`, `params`, `lr` and `weight_decay`; frozen parameters are in none.

    Matrices decay, vectors (biases, norms) do not. An output matrix that is tied to the trunk's embeddings belongs to
    the trunk. With a layer decay d, layer i of L learns at `learning_rate` * d ** (L + 1 - i), counted from the bottom:
    the embeddings (i = 0) slowest, what stands above the layers (i = L + 1) at the full rate. That is discriminative
    fine-tuning (Howard and Ruder, 2018, d = 1 / 2.6) with ELECTRA's choice of d, 0.8 to 0.9 (Clark et al., 2020), and
    one step from the top layer to what is above it, where ELECTRA's code takes two.
    """
    layers = len(trunk_layers(model, trunk=trunk))
    groups: dict[str, dict[str, Any]] = {}
    for _, parameter, place in _placed(model, trunk):
        if not parameter.requires_grad:
            continue
        if place is None:
            group, rate = "heads", learning_rate if head_learning_rate is None else head_learning_rate
        elif layer_decay is None:
            group, rate = "trunk", learning_rate
        else:
            group, rate = _place_name(place, layers), learning_rate * layer_decay ** (layers + 1 - place)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group += " matrices" if parameter.ndim > 1 else " vectors"
        made = {"name": group, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault(group, made)["params"].append(parameter)
    return list(groups.values())


def trunk_layers(model: nn.Module, *, trunk: str = "trunk") -> nn.ModuleList:
    """The trunk's stack of layers: the longest of its outermost module lists. Raises ConfigError if it has none.

    Layers that share their weights (ALBERT) are one.
    """
    lists = {name: module for name, module in _trunk(model, trunk).named_modules() if isinstance(module, nn.ModuleList)}
    outer = [lists[name] for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if not outer:
        raise ConfigError(f"{type(_trunk(model, trunk)).__name__} has no list of layers to count")
    return max(outer, key=len)


def freeze(model: nn.Module, what: Sequence[str], *, trunk: str = "trunk") -> list[str]:
    """Keep parameters as they are, and return their names.

    what    `embeddings` (all below the layers), `trunk`, `layers:N` (the lowest N layers and nothing else), or a
            pattern over parameter names, as `trunk.encoder.layer.0.*` or `*.bias`

    Dropout stays active in frozen modules, as in the trunk's own training. Raises ConfigError, and freezes nothing,
    for a pattern without a match and where nothing would be left to train.
    """
    placed, layers = list(_placed(model, trunk)), len(trunk_layers(model, trunk=trunk))
    frozen: dict[str, nn.Parameter] = {}
    for pattern in what:
        found = {name: parameter for name, parameter, place in placed if _matches(pattern, name, place, layers)}
        if not found:
            some = ", ".join(name for name, _, _ in placed[:: max(len(placed) // 4, 1)])
            raise ConfigError(f"freeze: no parameter matches {pattern!r}; names are such as {some}")
        frozen |= found
    if frozen and all(name in frozen or not parameter.requires_grad for name, parameter, _ in placed):
        raise ConfigError(f"freeze: {', '.join(what)} leaves no parameter to train")
    for parameter in frozen.values():
        parameter.requires_grad = False
    return list(frozen)


def make_optimizer(
    args: TrainingArguments, model: nn.Module, groups: Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer that Transformers makes for `args.optim` and its settings, over these groups.

    Raises ConfigError for one that chooses its parameters itself or steps in hooks, and so has no use for groups, and
    for one whose package is not installed.
    """
    from transformers import Trainer

    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(_OF_THEIR_OWN):
        found = f"{name} picks its own parameters or steps while gradients are made"
        raise ConfigError(f"optim: {found}, so rates of heads and layers cannot hold; adamw_torch or adafactor can")
    try:
        made, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"optim: {name} cannot be used: {error}") from error
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise ConfigError(f"optim: {name} is made of several optimizers, which parameter groups cannot be handed to")
    return made(list(groups), **settings)


def _trunk(model: nn.Module, attribute: str) -> nn.Module:
    return model.get_submodule(attribute)


def _placed(model: nn.Module, trunk: str) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """(name, parameter, place) of every parameter, each once.

    What the trunk registers before its layers is below them, and so are embeddings wherever they are registered
    (relative positions often come last); the rest is above.
    """
    layers = trunk_layers(model, trunk=trunk)
    place_of = {id(p): place for place, layer in enumerate(layers, 1) for p in layer.parameters()}
    tables = {id(p) for m in _trunk(model, trunk).modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    place = 0
    for parameter in _trunk(model, trunk).parameters():
        if id(parameter) in place_of:
            place = len(layers) + 1
        else:
            place_of[id(parameter)] = 0 if id(parameter) in tables else place
    for name, parameter in model.named_parameters():
        yield name, parameter, place_of.get(id(parameter))


def _place_name(place: int, layers: int) -> str:
    return "embeddings" if place == 0 else "top" if place > layers else f"layer {place}"


def _matches(pattern: str, name: str, place: int | None, layers: int) -> bool:
    if pattern == "trunk":
        return place is not None
    if pattern == "embeddings":
        return place == 0
    if pattern.startswith("layers:"):
        count = pattern.removeprefix("layers:")
        if not count.isdecimal() or not 1 <= int(count) <= layers:
            raise ConfigError(f"freeze: {pattern!r} names no layers; this trunk has layers:1 to layers:{layers}")
        return place is not None and 1 <= place <= int(count)
    return fnmatchcase(name, pattern)
