"""What replaces torch's dropout and attention in training on a CPU, against torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.training.conftest import Run
from training.prepare import prepare
from training.runfile import read_config
from training.trainer import on_cpu
from training.trainer.fit import fit
from training.trainer.on_cpu import LONGEST, OnCpu, dropped


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float) -> None:
    torch.manual_seed(0)
    states = torch.ones(1000, 1003)
    found = dropped(states, share)
    zeros = (found == 0).float()
    wanted = round(share * 256) / 256
    assert float(zeros.mean()) == pytest.approx(wanted, abs=0.002)
    assert float(found.mean()) == pytest.approx(1, abs=0.01 / (1 - share))
    assert len(found.unique()) == 2
    columns = zeros.flatten()[: 1003 * 1000 // 8 * 8].view(-1, 8).mean(0)
    assert float((columns - wanted).abs().max()) < 0.006, "each of a number's eight bytes"
    neighbours = zeros.flatten()
    assert float((neighbours[:-1] * neighbours[1:]).mean()) == pytest.approx(wanted**2, abs=0.003), "independent"
    assert not torch.equal(dropped(states, share), found)
    torch.manual_seed(0)
    assert torch.equal(dropped(states, share), found), "it follows from the seed"


def test_dropout_of_all_and_of_none() -> None:
    assert not dropped(torch.ones(5), 1.0).any()
    with OnCpu():
        assert torch.equal(functional.dropout(torch.ones(5), 0.0), torch.ones(5))
        assert torch.equal(functional.dropout(torch.ones(5), 0.7, training=False), torch.ones(5))
    assert dropped(torch.ones(400, dtype=torch.bfloat16), 0.1).dtype == torch.bfloat16


def test_gradients_pass_where_values_did() -> None:
    states = torch.randn(64, 32, requires_grad=True)
    layer = nn.Dropout(0.3)
    with OnCpu():
        found = layer(states)
    found.sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad == 0, found == 0)
    torch.testing.assert_close(found, states.detach() * states.grad)


def masks(rows: int, keys: int) -> dict[str, dict[str, Any]]:
    allowed = torch.rand(3, 1, rows, keys) < 0.7
    allowed[..., 0] = True
    return {
        "none": {},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.randn(3, 1, rows, keys)},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize("which", list(masks(7, 7)))
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_is_torchs(which: str, groups: int) -> None:
    torch.manual_seed(1)
    query = torch.randn(3, 4, 7, 8, requires_grad=True)
    key, value = (torch.randn(3, 4 // groups, 7, 8, requires_grad=True) for _ in range(2))
    given = {**masks(7, 7)[which], "enable_gqa": groups > 1}
    inputs, made = (query, key, value), []
    for context in (sdpa_kernel(SDPBackend.MATH), OnCpu()):
        with context:
            found = functional.scaled_dot_product_attention(query, key, value, **given)
        made.append((found, *torch.autograd.grad(found.pow(2).sum(), inputs)))
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_shares_of_attention_are_dropped_too() -> None:
    torch.manual_seed(2)
    query, key = (torch.randn(20, 4, 16, 8, requires_grad=True) for _ in range(2))
    value = torch.eye(16).expand(20, 4, 16, 16)  # so that the result is the shares themselves
    with OnCpu():
        whole = functional.scaled_dot_product_attention(query, key, value)
        found = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.2)
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(1 - 51 / 256, abs=0.01)
    torch.testing.assert_close(found[kept], whole[kept] * 256 / 205)


def test_only_training_on_short_rows_of_a_cpu_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_dropout", "_attention"):
        monkeypatch.setattr(on_cpu, name, lambda *_, name=name, **__: calls.append(name))
    short, long = torch.ones(1, 1, 4, 2), torch.ones(1, 1, LONGEST + 1, 2)
    with OnCpu():
        functional.scaled_dot_product_attention(long, long, long)
        with torch.no_grad():
            functional.scaled_dot_product_attention(short, short, short)
            functional.dropout(short, 0.5)
        assert not calls
        functional.scaled_dot_product_attention(short, short, short)
        functional.dropout(short, 0.5)
    functional.dropout(short, 0.5)
    assert calls == ["_attention", "_dropout"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_uses_it_unless_activations_are_computed_again(
    checkpointed: bool, run_file: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again they would have other dropout, and gradients would be those of another loss."""
    calls: list[int] = []

    def counted(states: torch.Tensor, share: float) -> torch.Tensor:
        calls.append(1)
        return dropped(states, share)

    monkeypatch.setattr(on_cpu, "dropped", counted)
    path: Path = run_file({"topic": "classification"})
    config = read_config(path, [f"training.gradient_checkpointing={str(checkpointed).lower()}"])
    run = prepare(config, base=path.parent)
    fit(run.model, run.runs, settings=config.training, seed=0, pad_id=run.trunk.spec.pad_id)
    assert bool(calls) is not checkpointed
