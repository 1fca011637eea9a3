"""Each change of the logits, against the class of Transformers that it follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin, logits_process

from mtserve.tasks.decoding import Decoding, processors

VOCAB = 300
SEEDS = range(12)


def random(seed: int, *, vocab: int = VOCAB) -> tuple[np.ndarray, np.ndarray]:
    """Logits, peaked or flat, some of them level or impossible, and ids with repetitions."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=vocab) * rng.choice([0.3, 2, 6])).astype(np.float32)
    if seed % 3 == 1:
        logits[rng.integers(vocab, size=vocab // 3)] = -np.inf
    return logits, rng.integers(0, 9, size=int(rng.integers(1, 30))).astype(np.int32)


def same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    wanted = theirs[0].numpy()
    assert ours.dtype == np.float32
    assert (np.isneginf(ours) == np.isneginf(wanted)).all()
    finite = np.isfinite(wanted)
    assert finite.any()
    np.testing.assert_allclose(ours[finite], wanted[finite], rtol=1e-6, atol=1e-6)


CASES: list[tuple[Any, Any]] = [
    *(
        (lambda s, i, p=p: processors.repetition_penalty(s, i, p), f"RepetitionPenaltyLogitsProcessor:{p}")
        for p in (0.5, 1.3)
    ),
    *(
        (lambda s, i, n=n: processors.no_repeat_ngram(s, i, n), f"NoRepeatNGramLogitsProcessor:{n}")
        for n in (1, 2, 3, 5)
    ),
    *((lambda s, i, k=k: processors.top_k(s, k), f"TopKLogitsWarper:{k}") for k in (1, 7, 299, 1000)),
    *((lambda s, i, p=p: processors.top_p(s, p), f"TopPLogitsWarper:{p}") for p in (1e-9, 0.3, 0.9, 0.999)),
    *((lambda s, i, p=p: processors.min_p(s, p), f"MinPLogitsWarper:{p}") for p in (0.01, 0.3, 1.0)),
]


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=[theirs for _, theirs in CASES])
def test_equals_the_class_of_transformers(ours: Any, theirs: str) -> None:
    name, _, value = theirs.partition(":")
    made = getattr(logits_process, name)(float(value) if {".", "e"} & set(value) else int(value))
    for seed in SEEDS:
        logits, ids = random(seed)
        before = logits.copy()
        same(ours(logits, ids), made(torch.from_numpy(ids)[None].long(), torch.from_numpy(before.copy())[None]))
        np.testing.assert_array_equal(logits, before)


def test_level_tokens_stay_in_top_k() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    same(processors.top_k(logits, 2), logits_process.TopKLogitsWarper(2)(None, torch.from_numpy(logits)[None]))
    assert np.isfinite(processors.top_k(logits, 2)).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("share", [1e-9, 0.5])
def test_level_tokens_stay_in_top_p(share: float) -> None:
    logits = np.full(VOCAB, 0.1, np.float32)
    assert np.isfinite(processors.top_p(logits, share)).all()
    logits[7] = 9
    assert np.flatnonzero(np.isfinite(processors.top_p(logits, share))).tolist() == [7]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_together_in_the_order_of_generate(seed: int) -> None:
    values: dict[str, Any] = {
        "do_sample": True,
        **{"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        **{"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    }
    logits, ids = random(seed)
    config = GenerationConfig(**values, eos_token_id=4)
    config._eos_token_tensor = torch.tensor([4])
    made = min(len(ids) - 1, seed)

    class Generating(GenerationMixin):
        def __init__(self) -> None:
            self.config = type("Config", (), {"is_encoder_decoder": False})()

    chain = Generating()._get_logits_processor(config, input_ids_seq_length=len(ids) - made)
    assert len(chain) == 7
    theirs = chain(torch.from_numpy(ids)[None].long(), torch.from_numpy(logits.copy())[None])
    same(processors.processed(logits, ids, Decoding(max_new_tokens=9, **values), made=made, end=4), theirs)


def test_nothing_asked_nothing_done() -> None:
    logits, ids = random(0)
    assert processors.processed(logits, ids, Decoding(max_new_tokens=9), made=0, end=4) is logits
    unused = Decoding(max_new_tokens=9, temperature=0.1, top_k=3)
    assert processors.processed(logits, ids, unused, made=0, end=4) is logits


def test_a_large_vocabulary() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=50257).astype(np.float32) * 4
    for share in (0.5, 0.95):
        same(
            processors.top_p(logits, share),
            logits_process.TopPLogitsWarper(share)(None, torch.from_numpy(logits)[None]),
        )


def test_choices() -> None:
    assert processors.best(np.array([0, 2, 1, 2], np.float32)) == 1
    logits = np.array([-np.inf, 0, np.log(3), -np.inf], np.float32)
    rng = np.random.default_rng(0)
    drawn = np.bincount([processors.draw(logits, rng) for _ in range(4000)], minlength=4)
    assert drawn[[0, 3]].sum() == 0
    assert abs(drawn[2] / 4000 - 0.75) < 0.03


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_logits_that_allow_no_choice(bad: float) -> None:
    logits = np.full(5, bad, np.float32)
    for choose in (processors.best, processors.log_softmax, lambda s: processors.draw(s, np.random.default_rng(0))):
        with pytest.raises(FloatingPointError, match="no token can be chosen: the largest logit is"):
            choose(logits)
    one = np.zeros(5, np.float32)
    one[3] = np.nan
    with pytest.raises(FloatingPointError, match="largest logit is nan"):
        processors.best(one)
