"""Low-rank adapters: what they train, what is left of them, and what cannot be adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mtserve
from mtserve.errors import ConfigError
from tests.tiny import trunk_of
from tests.training.conftest import Run
from training.run import train
from training.runfile import read_config
from training.trainer.lora import Lora, add_adapters, merge_adapters

FAMILIES = ("bert", "gpt2", "albert", "deberta-v2", "llama")
IDS, MASK = torch.arange(4, 20).reshape(2, 8), torch.ones(2, 8, dtype=torch.long)


def states(trunk: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = trunk(input_ids=IDS, attention_mask=MASK)[0]
    return hidden


def shape_of(trunk: nn.Module) -> dict[str, Any]:
    return {name: type(module) for name, module in trunk.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first_and_are_gone_once_merged(family: str) -> None:
    trunk = trunk_of(family).eval()
    before, modules, kept = states(trunk), shape_of(trunk), {n: t.clone() for n, t in trunk.state_dict().items()}
    adapters = add_adapters(trunk, Lora(rank=2, alpha=4))
    torch.testing.assert_close(states(trunk), before, rtol=0, atol=0)
    trained = [p for p in trunk.parameters() if p.requires_grad]
    assert trained
    assert all(2 in p.shape for p in trained), "matrices of rank 2 alone"
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1)
    adapted = states(trunk)
    assert (adapted - before).abs().max() > 1e-2
    merge_adapters(adapters)
    torch.testing.assert_close(states(trunk), adapted, rtol=1e-4, atol=1e-5)
    assert shape_of(trunk) == modules
    assert trunk.state_dict().keys() == kept.keys()
    ones = {name for name, tensor in trunk.state_dict().items() if not torch.equal(tensor, kept[name])}
    assert ones
    assert all(kept[name].ndim == 2 for name in ones), "no bias, no norm"
    assert not [name for name in ones if "embeddings" in name or "wte" in name or "embed_tokens" in name]


def test_a_rank_one_update_is_alpha_over_rank_times_the_product() -> None:
    trunk = trunk_of("bert").eval()
    layer = trunk.get_submodule("encoder.layer.1.attention.self.query")
    before = layer.weight.detach().clone()
    adapters = add_adapters(trunk, Lora(rank=1, alpha=6, targets="query"))
    named = dict(trunk.named_parameters())
    place = "encoder.layer.1.attention.self.query.lora_{}.default.weight"
    down, up = named[place.format("A")].detach(), named[place.format("B")].detach()
    assert not up.any(), "an update of nothing"
    up.fill_(0.5)
    expected = before + 6 * up @ down
    merge_adapters(adapters)
    after = trunk.get_submodule("encoder.layer.1.attention.self.query").weight
    torch.testing.assert_close(after.detach(), expected)


def test_a_run_with_adapters_seals_an_ordinary_trunk_and_resumes_to_the_bit(run_file: Run, tmp_path: Path) -> None:
    path = run_file({"topic": "classification"})
    adapters = "training.lora={rank: 2, targets: [query, value]}"
    common = [adapters, "training.learning_rate=0.01", "training.save_steps=2", "training.epochs=2"]

    def run(output: Path, *more: str) -> dict[str, torch.Tensor]:
        config = read_config(path, [*common, f"output={output}", *more])
        assert train(config, base=path.parent) is not None
        return weights(output)

    def weights(output: Path) -> dict[str, torch.Tensor]:
        model = mtserve.load(output).backend.model
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = run(tmp_path / "whole")
    assert not [name for name in whole if "lora" in name or "base_layer" in name]
    start = dict(trunk_of("bert").state_dict())
    moved = {name for name in start if not torch.equal(start[name], whole[f"trunk.{name}"])}
    assert moved
    assert all(name.endswith(("query.weight", "value.weight")) for name in moved), moved

    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        from training import run as module

        def stopped(*_: Any, **__: Any) -> None:
            raise Stop

        patch.setattr(module, "finish", stopped)
        with pytest.raises(Stop):
            run(tmp_path / "broken", "training.max_steps=3")
    again = run(tmp_path / "broken", "training.max_steps=3", "resume=true")
    straight = run(tmp_path / "straight", "training.max_steps=3")
    assert all(torch.equal(again[name], straight[name]) for name in straight)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["query", "nothing"]}, r"'nothing' is no linear layer; allowed: .*query"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"r": 4}, "unknown key 'r'; allowed: rank, alpha, dropout, targets"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_what_cannot_be_adapted_is_said(lora: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        add_adapters(trunk_of("bert"), Lora(**lora))


def test_without_peft_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs peft; install it with: pip install 'mtserve\[train\]'"):
        add_adapters(trunk_of("bert"), Lora())


def test_new_tokens_and_frozen_trunks_have_nothing_to_adapt(run_file: Run) -> None:
    path = run_file({"topic": "classification"})
    with pytest.raises(ConfigError, match="new rows of the embeddings"):
        read_config(path, ["training.lora.rank=4", "special_tokens=notebook"])
    with pytest.raises(ConfigError, match=r"training\.lora: with result: heads the trunk stays"):
        read_config(path, ["training.lora.rank=4", "result=heads"])
