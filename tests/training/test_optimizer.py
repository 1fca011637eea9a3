"""Which parameter learns at which rate, which is frozen, and the optimizers that accept such groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Adafactor, TrainingArguments

from mtserve.errors import ConfigError
from mtserve.model import Model
from mtserve.tasks.base import HeadSpec
from tests.tiny import FAMILIES, tiny, trunk_of
from training.trainer.optimizer import freeze, make_optimizer, parameter_groups, trunk_layers

SHARED = {"albert": 1}
BELOW = {
    "deberta-v2": "trunk.encoder.rel_embeddings.weight",
    "mpnet": "trunk.encoder.relative_attention_bias.weight",
    "albert": "trunk.encoder.embedding_hidden_mapping_in.weight",
    "electra": "trunk.embeddings_project.weight",
    "gpt2": "trunk.wpe.weight",
    "llama": "trunk.embed_tokens.weight",
}
ABOVE = {"gpt2": "trunk.ln_f.weight", "llama": "trunk.norm.weight", "modernbert": "trunk.final_norm.weight"}


def small(name: str) -> Model:
    model = Model(trunk_of(name))
    model.add("topic", HeadSpec(architecture="sequence_classification", labels=("a", "b")))
    return model


def of_each(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The group of each parameter, by name; every parameter that learns is in exactly one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = [(names[parameter], group) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in placed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert len({group["name"] for group in groups}) == len(groups)
    return dict(placed)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_rates_fall_from_the_head_to_the_embeddings(name: str) -> None:
    model = small(name)
    layers = SHARED.get(name, 2)
    assert len(trunk_layers(model)) == layers
    found = of_each(
        model, parameter_groups(model, learning_rate=1.0, head_learning_rate=7.0, weight_decay=0.1, layer_decay=0.5)
    )
    owners = {p: i for i, layer in enumerate(trunk_layers(model), 1) for p in layer.parameters()}
    for parameter_name, parameter in model.named_parameters():
        group = found[parameter_name]
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
        if parameter_name.startswith("heads."):
            assert group["lr"] == 7.0
        elif parameter in owners:
            assert group["lr"] == 0.5 ** (layers + 1 - owners[parameter])
            assert group["name"].startswith(f"layer {owners[parameter]} ")
        elif parameter_name in ABOVE.values() or ".pooler." in parameter_name:
            assert group["lr"] == 1.0
        elif parameter_name in BELOW.values() or ".embeddings." in parameter_name:
            assert group["lr"] == 0.5 ** (layers + 1)
    if name in BELOW:
        assert found[BELOW[name]]["name"] == "embeddings matrices"
    if name in ABOVE:
        assert found[ABOVE[name]]["name"] == "top vectors"


def test_without_decay_by_layer_there_are_a_trunk_and_heads() -> None:
    model = small("bert")
    groups = parameter_groups(model, learning_rate=1e-4, weight_decay=0.01)
    assert {(g["name"], g["lr"], g["weight_decay"]) for g in groups} == {
        ("trunk matrices", 1e-4, 0.01),
        ("trunk vectors", 1e-4, 0.0),
        ("heads matrices", 1e-4, 0.01),
        ("heads vectors", 1e-4, 0.0),
    }


def test_a_tied_output_matrix_belongs_to_the_trunk() -> None:
    model = tiny("gpt2", only=("forth",)).model
    groups = parameter_groups(model, learning_rate=1.0, head_learning_rate=7.0, weight_decay=0, layer_decay=0.5)
    assert of_each(model, groups)["trunk.wte.weight"]["lr"] == 0.5**3
    assert not any(group["name"].startswith("heads") for group in groups)


def test_a_stock_model_has_its_trunk_under_another_name() -> None:
    class Stock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = trunk_of("bert")
            self.classifier = nn.Linear(32, 2)

    model = Stock()
    groups = parameter_groups(model, learning_rate=1.0, head_learning_rate=3.0, weight_decay=0, trunk="bert")
    assert of_each(model, groups)["classifier.weight"]["lr"] == 3.0
    assert all(name.startswith("bert.") for name in freeze(model, ["trunk"], trunk="bert"))


def test_a_list_inside_a_layer_is_no_stack_of_layers() -> None:
    model = nn.Module()
    model.trunk = nn.Module()
    model.trunk.layers = nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in range(9)) for _ in range(3))
    assert len(trunk_layers(model)) == 3
    model.trunk = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="Linear has no list of layers"):
        trunk_layers(model)


@pytest.mark.parametrize(
    ("what", "prefixes"),
    [
        (["embeddings"], ["trunk.embeddings."]),
        (["layers:1"], ["trunk.encoder.layer.0."]),
        (["embeddings", "layers:2"], ["trunk.embeddings.", "trunk.encoder.layer.0.", "trunk.encoder.layer.1."]),
        (["trunk"], ["trunk."]),
        (["heads.task:topic.*"], ["heads.task:topic."]),
        (["trunk.encoder.layer.?.attention.*"], [f"trunk.encoder.layer.{n}.attention." for n in (0, 1)]),
    ],
)
def test_freezing_keeps_just_what_is_named(what: list[str], prefixes: list[str]) -> None:
    model = small("bert")
    wanted = [n for n, _ in model.named_parameters() if n.startswith(tuple(prefixes))]
    assert sorted(freeze(model, what)) == sorted(wanted)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.1)
    of_each(model, groups)
    ids = torch.tensor([[1, 5, 6, 2]])
    model("topic", ids, torch.ones_like(ids), torch.zeros_like(ids)).sum().backward()
    torch.optim.SGD(groups).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not moved & set(wanted)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["trunk.nothing.*"], r"no parameter matches 'trunk.nothing.\*'; names are such as trunk.embeddings"),
        (["layers:3"], "this trunk has layers:1 to layers:2"),
        (["layers:all"], "'layers:all' names no layers"),
        (["trunk", "heads.*"], r"trunk, heads.\* leaves no parameter to train"),
    ],
)
def test_freezing_nothing_or_everything_is_an_error(what: list[str], message: str) -> None:
    model = small("bert")
    with pytest.raises(ConfigError, match=message):
        freeze(model, what)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("optim", "made"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("adafactor", Adafactor),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
    ],
)
def test_each_optimizer_steps_by_the_rates_of_its_groups(optim: str, made: type, tmp_path: Path) -> None:
    model = small("bert")
    groups = parameter_groups(model, learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1, layer_decay=0.5)
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, learning_rate=1e-3, use_cpu=True)
    optimizer = make_optimizer(args, model, groups)
    assert type(optimizer) is made
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in groups]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [g["weight_decay"] for g in groups]
    before = model.trunk.get_input_embeddings().weight.detach().clone()
    ids = torch.tensor([[1, 5, 6, 2]])
    model("topic", ids, torch.ones_like(ids), torch.zeros_like(ids)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.trunk.get_input_embeddings().weight)


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "lomo", "adalomo", "galore_adafactor_layerwise"])
def test_optimizers_without_groups_are_refused(optim: str, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    with pytest.raises(ConfigError, match=f"optim: {optim} picks its own parameters"):
        make_optimizer(args, small("bert"), [])


def test_an_optimizer_that_is_not_installed_is_one_sentence(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), optim="grokadamw", use_cpu=True)
    with pytest.raises(ConfigError, match="optim: grokadamw cannot be used: Please install"):
        make_optimizer(args, small("bert"), [])
