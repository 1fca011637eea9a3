"""How a model computes when it serves: rows end to end, packed and joined layers, other precisions."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from mtserve.backends import flat
from mtserve.backends.eager import EagerBackend
from mtserve.backends.int8 import supported
from mtserve.backends.serving import Served
from mtserve.batching import Batch, padded_cost, real_cost
from mtserve.engine import Engine
from mtserve.model import Model
from mtserve.rows import Floats, Past, Row, make_row
from tests.tiny import FAMILIES, PAD, VOCAB, tiny

FLAT = ("albert", "bert", "distilbert", "electra", "gpt2", "llama", "modernbert", "qwen2", "roberta", "xlm-roberta")
PADDED = ("deberta-v2", "mpnet")
LENGTHS = (9, 31, 1, 9, 4, 60, 31)


def model_of(family: str) -> Model:
    if family == "qwen2":
        torch.manual_seed(0)
        return Model(AutoModel.from_config(AutoConfig.for_model("qwen2", **FAMILIES["llama"]))).eval()
    return tiny(family).model


def rows_of(lengths: tuple[int, ...], *, types: bool = False) -> list[Row]:
    random = np.random.default_rng(3)
    ids = [random.integers(PAD + 5, VOCAB, n) for n in lengths]
    return [
        make_row(i, [int(types and 2 * at > n) for at in range(n)], [(0, 0)] * n, [False] * n)
        for i, n in zip(ids, lengths, strict=True)
    ]


def states(backend: EagerBackend, rows: list[Row]) -> list[Any]:
    """Hidden states of each row, and pooler outputs where there are some."""
    with backend._evaluating():
        found = backend._computed(rows, [0] * len(rows), pooled=True)
    each = [found.hidden[s : s + n].float() for s, n in zip(found.starts, found.counts, strict=True)]
    return each if found.pooled is None else [*each, found.pooled.float()]


def worst(found: list[Any], wanted: list[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def alone(model: Model, rows: list[Row]) -> list[Any]:
    """Each row by itself through the model's own trunk, with Transformers' eager attention where the trunk has it."""
    found, pooled = [], []
    with torch.inference_mode():
        for row in rows:
            ids, types = (torch.from_numpy(of.astype(np.int64))[None] for of in (row.ids, row.type_ids))
            one = model.states(ids, torch.ones_like(ids), types)
            found.append(one.hidden[0])
            pooled.append(one.pooled)
    return found if pooled[0] is None else [*found, torch.cat(pooled)]


def test_every_family_is_named_here() -> None:
    assert {*FLAT, *PADDED} >= set(FAMILIES)


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("family", FLAT)
def test_rows_end_to_end_have_the_states_of_each_alone(family: str, capture: bool, types: bool) -> None:
    model, rows = model_of(family), rows_of(LENGTHS, types=types)
    backend = EagerBackend(model, pad_id=PAD, capture=capture)
    assert backend.served.flat
    assert backend.cost is real_cost
    assert (backend.served.captured is not None) == capture
    wanted = alone(model, rows)
    scale = max(float(one.abs().max()) for one in wanted)
    assert worst(states(backend, rows), wanted) < 1e-5 * max(scale, 1)
    assert worst(states(backend, rows[:1]), alone(model, rows[:1])) < 1e-5 * max(scale, 1)


@pytest.mark.parametrize("family", PADDED)
def test_families_without_the_interface_are_padded_and_said_so(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = model_of(family), rows_of(LENGTHS)
    with caplog.at_level(logging.WARNING):
        backend = EagerBackend(model, pad_id=PAD, capture=True)
        assert not backend.served.flat
    assert backend.cost is padded_cost
    assert [family in record.getMessage() for record in caplog.records if "padded" in record.getMessage()] == [True]
    wanted = alone(model, rows)
    assert worst(states(backend, rows), wanted) < 3e-6 * max(float(one.abs().max()) for one in wanted)


def test_an_attention_that_is_not_understood_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong kernel must not serve: the rows of the proof give other states, and the trunk pads."""
    right = flat.Block.attend

    def wrong(self: Any, query: Any, key: Any, value: Any, **how: Any) -> Any:
        return right(self, query, key, value.roll(1, 1), **how)

    monkeypatch.setattr(flat.Block, "attend", wrong)
    with caplog.at_level(logging.WARNING):
        assert not EagerBackend(model_of("bert"), pad_id=PAD).served.flat
    assert "states differ by" in caplog.text


def test_a_keyword_that_is_not_understood_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="softcap"):
        flat.attend(torch.nn.Module(), *[torch.zeros(1, 1, 2, 4)] * 3, None, layout=flat.fresh([2]), softcap=3.0)


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [9, 9, 3, 2, 2], [70, 60, 1], [200, 40, 40, 7]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("fill", [0, 3])
def test_attention_of_each_layout(lengths: list[int], causal: bool, window: int | None, fill: int) -> None:
    """Against softmax(q k / sqrt(d)) v written out, row by row, with grouped heads; what stands behind is finite."""
    torch.manual_seed(1)
    tokens = sum(lengths) + fill
    q, k, v = torch.randn(4, tokens, 8), torch.randn(2, tokens, 8), torch.randn(2, tokens, 8)
    how = {"scale": 0.3, "causal": causal, "window": window}
    found = flat.fresh(lengths, fill=fill).attend(q, k, v, **how)
    assert found.shape == (tokens, 4, 8)
    assert found.isfinite().all()
    first = 0
    for length in lengths:
        at = slice(first, first + length)
        away = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (away < 0 if causal else away.abs() < 0) | (away.abs() >= (window or 10**6))
        for head in range(4):
            scores = q[head, at] @ k[head // 2, at].T * 0.3
            wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[head // 2, at]
            torch.testing.assert_close(found[at, head], wanted, atol=1e-5, rtol=1e-5)
        first += length


def test_passes_have_few_sizes() -> None:
    """Else kernels would be made, and kept, for every number of tokens."""
    tokens = range(1, 4097)
    assert len({total + flat.filling(total) for total in tokens}) == 100
    assert all(0 <= flat.filling(total) < max(4, total / 4) for total in tokens)
    small = tiny("bert")
    encode, seen = small.engine.backend.served.encode, set[int]()

    def noting(ids: Any, *more: Any) -> Any:
        seen.add(len(ids))
        return encode(ids, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(small.engine.backend.served, "encode", noting)
        for count in range(1, 20):
            small.engine.predict("topic", ["good " * (at % 5 + 1) + str(at) for at in range(count)])
    assert len(seen) > 3
    assert all(size % 4 == 0 for size in seen)


def test_serving_and_training_share_weights_and_no_config() -> None:
    model = model_of("bert")
    served = Served(model, "fp32", follow=True)
    theirs = dict(served.trunk.named_parameters())
    assert all(theirs[name] is parameter for name, parameter in model.trunk.named_parameters())
    assert served.trunk.config is not model.trunk.config
    assert served.trunk.config._attn_implementation == flat.NAME
    assert model.trunk.config._attn_implementation != flat.NAME
    assert type(served.trunk.encoder) is type(model.trunk.encoder)


def test_a_backend_that_follows_sees_new_weights() -> None:
    model, rows = model_of("bert"), rows_of((5, 8))
    backend = EagerBackend(model, pad_id=PAD, follow=True)
    before = states(backend, rows)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.mul_(1.1)
    after = states(backend, rows)
    assert worst(after, before) > 1e-2
    assert worst(after, alone(model, rows)) < 1e-5


@pytest.mark.parametrize("profile", ["bf16", "int8"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert", "deberta-v2"])
def test_other_precisions_are_near(family: str, profile: str) -> None:
    if profile == "int8" and not supported():
        pytest.skip("this processor has no fast 8-bit products")
    model, rows = model_of(family), rows_of(LENGTHS)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = torch.cat(alone(model, rows)[: len(rows)])
    cosines = {}
    for capture in (False, True):
        backend = EagerBackend(model, pad_id=PAD, profile=profile, capture=capture)
        found = torch.cat(states(backend, rows)[: len(rows)])
        assert not torch.equal(found, wanted)
        cosines[capture] = torch.nn.functional.cosine_similarity(found, wanted, dim=1).mean().item()
    assert min(cosines.values()) > 0.98, cosines  # random weights this wide are harder than trained ones
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("profile", ["fp32", "bf16"])
def test_tied_heads_share_one_matrix_as_served(profile: str) -> None:
    small = tiny("gpt2")
    served = EagerBackend(small.model, pad_id=PAD, profile=profile).served
    one, other = (served.head(task).stock.lm_head for task in ("forth", "back"))  # type: ignore[union-attr]
    assert one is other
    assert one.packed is not None
    assert small.model.tied("forth") == {"lm_head.weight": "wte.weight"}


@pytest.mark.parametrize("profile", ["fp32", "bf16"])
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_generation_goes_on_in_every_form(family: str, capture: bool, profile: str) -> None:
    """Steps from kept keys and values give the logits of the whole row, joined rows of different lengths included."""
    small = tiny(family)
    backend = EagerBackend(small.model, pad_id=PAD, profile=profile, capture=capture)
    assert backend.keeps

    def answers(rows: list[Row]) -> list[Floats]:
        return backend.run(Batch(tuple(rows), {"forth": tuple(range(len(rows)))}))["forth"]

    rows = [row.extended([], past=Past()) for row in rows_of((5, 9, 2))]
    close = {"fp32": 1e-5, "bf16": 0.2}[profile]
    for step in range(4):
        before = backend.tokens
        found = answers(rows)
        assert backend.tokens - before == (16 if step == 0 else sum(1 + (at == step % 3) for at in range(3)))
        for at, row in enumerate(rows):
            (whole,) = answers([row.extended([], past=None)])
            scale = max(1.0, float(np.abs(whole).max()))
            np.testing.assert_allclose(found[at], whole, atol=close * scale)
        nexts = [[7 + step] * (1 + (at == (step + 1) % 3)) for at in range(3)]
        rows = [row.extended(more, past=row.past) for row, more in zip(rows, nexts, strict=True)]


def test_a_captured_pass_answers_as_the_modules_do() -> None:
    small = tiny("bert")
    captured = Engine(small.tasks, EagerBackend(small.model, pad_id=PAD, capture=True), small.text)
    for task in small.tasks:
        sample = task.kind.sample(task.options)
        assert captured.predict(task.name, [sample]) == small.engine.predict(task.name, [sample])
