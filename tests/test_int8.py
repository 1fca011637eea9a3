"""8-bit linears: their error against its bounds, independence of tokens, and which linears of a trunk they replace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mtserve.backends import int8
from mtserve.backends.int8 import Int8Linear, obstacle, quantize_, supported
from mtserve.errors import SetupError
from tests.tiny import VOCAB, trunk_of

needs_units = pytest.mark.skipif(not supported(), reason=str(obstacle()))
SHAPES = [(384, 1536), (1536, 384), (48, 32), (32, 48), (36, 5)]
LAYERS = {
    "albert": ["query", "key", "value", "dense", "ffn", "ffn_output"],
    "bert": [
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    ],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "llama": [
        *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    ],
    "modernbert": ["attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"],
}
PREFIX = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers", "modernbert": "layers"}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@contextmanager
def probes(monkeypatch: pytest.MonkeyPatch, **answers: bool | None) -> Iterator[None]:
    with monkeypatch.context() as patched:
        for name, answer in answers.items():
            if answer is None:
                patched.delattr(torch.cpu, name, raising=False)
            else:
                patched.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
        yield


def steps(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One integer's worth of each token's inputs (tokens, 1), and of each output's weights (out,)."""
    return (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255, weight.abs().amax(1) / 127


@needs_units
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_the_error_is_that_of_rounding(n_in: int, n_out: int, bias: bool) -> None:
    linear = nn.Linear(n_in, n_out, bias=bias)
    x = torch.randn(3, 37, n_in) * torch.rand(3, 37, 1) * 4 + torch.randn(3, 37, 1)
    error = Int8Linear(linear.weight, linear.bias)(x) - linear(x)
    of_x, of_w = steps(x, linear.weight)
    sums = x.abs().sum(-1, keepdim=True), linear.weight.abs().sum(1)
    bound = of_x / 2 * sums[1] + of_w / 2 * sums[0] + n_in * of_x * of_w / 4
    assert torch.all(error.abs() <= bound * 1.001 + 1e-5)  # every rounding at its worst
    squares = x.square().sum(-1, keepdim=True), linear.weight.square().sum(1)
    variance = (of_x**2 * squares[1] + of_w**2 * squares[0]) / 12  # roundings independent and uniform
    if n_in * n_out > 10_000:
        assert 0.9 < (error.square().mean() / variance.mean()).sqrt() < 1.1
    else:
        assert (error.square().mean() / variance.mean()).sqrt() < 1.5


@needs_units
def test_the_largest_integers_do_not_saturate() -> None:
    x, weight = torch.ones(2, 4096), torch.ones(16, 4096)
    x[:, 0], weight[:, 0] = 0, -1
    assert torch.allclose(Int8Linear(weight, None)(x), functional.linear(x, weight), rtol=1e-5)


@needs_units
def test_a_spread_keeps_channels_apart_that_stick_out() -> None:
    linear, x = nn.Linear(384, 96), torch.randn(200, 384)
    x[:, 7] *= 60
    spread = x.square().mean(0).sqrt()
    plain, smooth = (Int8Linear(linear.weight, linear.bias, spread=s)(x) - linear(x) for s in (None, spread))
    assert smooth.norm() < plain.norm() / 2


@needs_units
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_a_token_alone_is_the_token_in_a_batch(family: str) -> None:
    x = torch.randn(17, 29, 384)
    x[3] *= 1000
    linear = Int8Linear(torch.randn(96, 384), torch.randn(96), spread=torch.rand(384))
    together = linear(x)
    for row in (0, 3, 16):
        assert torch.allclose(linear(x[row : row + 1]), together[row : row + 1], rtol=1e-6, atol=1e-6)
        assert torch.allclose(linear(x[row, 5]), together[row, 5], rtol=1e-6, atol=1e-6)
    trunk = trunk_of(family)
    quantize_(trunk)
    ids = torch.randint(5, VOCAB, (6, 11))
    states = trunk(input_ids=ids).last_hidden_state
    for row in range(6):
        alone = trunk(input_ids=ids[row : row + 1]).last_hidden_state
        # What float attention differs by may move a value over the edge between two integers, and so by a step.
        assert torch.allclose(alone[0], states[row], atol=1e-2)


@needs_units
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    linear = Int8Linear(torch.randn(24, 32), torch.randn(24))
    x = torch.randn(5, 9, 32, dtype=dtype)
    whole = linear(x)
    monkeypatch.setattr(int8, "_BLOCK", 7)
    assert torch.equal(linear(x), whole)
    assert torch.equal(linear(x.transpose(0, 1)), whole.transpose(0, 1))


@needs_units
def test_inputs_of_any_form() -> None:
    linear = nn.Linear(32, 8)
    made = Int8Linear(linear.weight, linear.bias)
    x = torch.randn(4, 6, 32)
    assert torch.equal(made(x.transpose(0, 1)), made(x).transpose(0, 1))
    assert made(x[:0]).shape == (0, 6, 8)
    assert torch.isfinite(made(torch.zeros(2, 32))).all()
    assert torch.allclose(made(torch.zeros(1, 32))[0], linear.bias, atol=1e-6)
    half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, made(x.bfloat16().float()).bfloat16())
    broken = x.clone()
    broken[0, 0, 0] = torch.nan
    assert torch.equal(made(broken)[1:], made(x)[1:])


@needs_units
def test_a_width_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 4, not 30"):
        Int8Linear(torch.randn(8, 30), None)
    trunk = trunk_of("bert")
    trunk.encoder.layer[0].output.dense = nn.Linear(30, 32)
    assert "encoder.layer.0.output.dense" not in int8._linears(trunk)


@needs_units
def test_conv1d_is_a_linear_of_transposed_weights() -> None:
    trunk = trunk_of("gpt2")
    conv = trunk.h[0].mlp.c_fc
    assert isinstance(conv, Conv1D)
    x = torch.randn(5, 32)
    made = Int8Linear(conv.weight.T, conv.bias)
    assert (made(x) - conv(x)).norm() < 0.02 * conv(x).norm()
    assert (made.in_features, made.out_features) == (32, 4 * 32)


@needs_units
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_all_linears_of_the_layers_are_replaced_and_no_others(family: str) -> None:
    trunk = trunk_of(family)
    ids = torch.randint(5, VOCAB, (4, 19))
    before, size = trunk(input_ids=ids).last_hidden_state, trunk.num_parameters()
    names = quantize_(trunk)
    assert names == [f"{PREFIX[family]}.{layer}.{part}" for layer in range(2) for part in LAYERS[family]]
    assert all(isinstance(trunk.get_submodule(name), Int8Linear) for name in names)
    assert {name for name, m in trunk.named_modules() if isinstance(m, Int8Linear)} == set(names)
    assert trunk.num_parameters() < size
    assert not any(name.startswith(tuple(names)) for name in trunk.state_dict())
    after = trunk(input_ids=ids).last_hidden_state
    cosine = functional.cosine_similarity(after, before, dim=-1)
    assert cosine.min() > 0.98
    assert cosine.mean() > 0.998


@needs_units
def test_linears_can_be_kept_by_name() -> None:
    trunk = trunk_of("bert")
    kept = [f"encoder.layer.{layer}.output.dense" for layer in range(2)]
    names = quantize_(trunk, keep=kept)
    assert len(names) == 10
    assert all(type(trunk.get_submodule(name)) is nn.Linear for name in kept)
    with pytest.raises(ValueError, match=r"pooler\.dense"):
        quantize_(trunk_of("bert"), keep=["pooler.dense"])


@needs_units
def test_layers_that_a_family_shares_are_replaced_once() -> None:
    trunk = trunk_of("albert")
    names = quantize_(trunk)
    assert {name.rsplit(".", 1)[-1] for name in names} == set(LAYERS["albert"])
    trunk = trunk_of("bert")
    trunk.encoder.layer[1].output.dense = trunk.encoder.layer[0].output.dense
    assert len(quantize_(trunk)) == 12
    assert trunk.encoder.layer[1].output.dense is trunk.encoder.layer[0].output.dense


@needs_units
def test_the_same_trunk_gives_the_same_answers_and_keeps_its_mode() -> None:
    ids = torch.randint(5, VOCAB, (4, 19))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trunk = trunk_of("bert").train()
        quantize_(trunk)
        assert trunk.training
        states.append(trunk.eval()(input_ids=ids).last_hidden_state)
        assert not any(module._forward_pre_hooks for module in trunk.modules())
    assert torch.equal(*states)


def test_refused_where_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    vnni, amx = int8._CAPABILITIES
    with probes(monkeypatch, **{vnni: False, amx: False}):
        assert not supported()
        trunk = trunk_of("bert")
        with pytest.raises(SetupError, match="neither VNNI"):
            quantize_(trunk)
        assert not any(isinstance(module, Int8Linear) for module in trunk.modules())
    with probes(monkeypatch, **{vnni: None, amx: True}):
        assert "torch.cpu._is_vnni_supported is missing" in str(obstacle())
    for first, second in ((True, False), (False, True)):
        with probes(monkeypatch, **{vnni: first, amx: second}):
            assert supported()
    monkeypatch.setattr(int8, "_OPERATORS", ("onednn::of_another_version",))
    with probes(monkeypatch, **{vnni: True, amx: True}):
        assert "no operator onednn::of_another_version" in str(obstacle())
