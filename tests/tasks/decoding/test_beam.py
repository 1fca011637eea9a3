"""Beam search, against Transformers' own on tiny models."""

from __future__ import annotations

from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from mtserve.tasks.decoding import Decoding, make_search
from tests.tasks.decoding.drive import PROMPTS, answers, drive, forward, model, words
from tests.tiny import EOS


def generate(
    family: str, prompt: list[int], *, bias: float = 0.0, **values: Any
) -> tuple[list[list[int]], list[float]]:
    """Tokens of each answer without the end token, and scores, as `generate` has them; `bias` as in `forward`."""

    def likelier_end(module: Any, args: Any, output: Any) -> None:
        output.logits[..., EOS] += bias

    hook = model(family).register_forward_hook(likelier_end)
    try:
        out = model(family).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": EOS, "eos_token_id": EOS, **values},
            return_dict_in_generate=True,
            output_scores=True,
        )
    finally:
        hook.remove()
    made = [[*whole, EOS] for whole in out.sequences[:, len(prompt) :].tolist()]
    return [whole[: whole.index(EOS)] for whole in made], out.sequences_scores.tolist()


CASES: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 5, "num_return_sequences": 5},
    {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 1},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 2.0, "max_new_tokens": 12},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -1.5},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True, "max_new_tokens": 12},
    {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 1.6, "max_new_tokens": 12},
    {"num_beams": 4, "num_return_sequences": 2, "min_new_tokens": 4},
    {"num_beams": 4, "num_return_sequences": 4, "no_repeat_ngram_size": 2, "max_new_tokens": 14},
    {
        **{"num_beams": 5, "num_return_sequences": 5, "early_stopping": True, "length_penalty": 0.6},
        **{"repetition_penalty": 0.8, "no_repeat_ngram_size": 1, "min_new_tokens": 2},
    },
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("values", CASES, ids=lambda values: "-".join(f"{v}" for v in values.values()))
def test_equals_generate(family: str, values: dict[str, Any]) -> None:
    reasons = set()
    for bias in (0.0, 7.0, 14.0):
        for prompt in PROMPTS:
            theirs, scores = generate(family, prompt, bias=bias, **values)
            ours = answers(forward(family, bias=bias), prompt, **values)
            reasons |= {answer.finish_reason for answer in ours}
            assert [list(answer.tokens) for answer in ours] == theirs
            np.testing.assert_allclose([answer.score for answer in ours], scores, atol=1e-4, rtol=1e-5)
            assert [answer.text for answer in ours] == [words(tokens) for tokens in theirs]
    assert reasons >= {"eos_token", "length"} or values.get("max_new_tokens") == 1


def test_stop_strings_equal_generate() -> None:
    """The same sequences end in the same step; the text of an answer ends before the string."""
    run, stopped = forward("gpt2"), 0
    for prompt in PROMPTS:
        values: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10}
        stop = words(list(answers(run, prompt, **values)[0].tokens[2:4]))

        class Stops(StoppingCriteria):
            def __call__(
                self, ids: torch.Tensor, scores: Any, stop: str = stop, skip: int = len(prompt)
            ) -> torch.Tensor:
                return torch.tensor([stop in words(row[skip:]) for row in ids.tolist()])

        theirs, scores = generate("gpt2", prompt, **values, stopping_criteria=StoppingCriteriaList([Stops()]))
        ours = answers(run, prompt, **values, stop_strings=(stop,))
        assert [list(answer.tokens) for answer in ours] == theirs
        np.testing.assert_allclose([answer.score for answer in ours], scores, atol=1e-4)
        for answer in ours:
            whole = words(list(answer.tokens))
            assert (answer.finish_reason == "stop_sequence") == (stop in whole)
            assert whole.startswith(answer.text + stop) if stop in whole else answer.text == whole
            stopped += stop in whole
    assert stopped


def test_read_along_only_after_the_end() -> None:
    seen = []
    search = drive(
        forward("gpt2"),
        PROMPTS[0],
        num_beams=2,
        logprobs=True,
        watch=lambda s: seen.append((s.tokens, s.finish_reason)),
    )
    assert seen[:-1] == [((), None)] * (len(seen) - 1)
    best = search.answers[0]
    assert search.tokens == best.tokens
    assert search.finish_reason == best.finish_reason == "length"
    assert len(search.logprobs) == len(best.tokens)
    assert sum(search.logprobs) / len(best.tokens) == pytest.approx(best.score)
    assert not isnan(best.score)


def test_a_small_vocabulary_that_is_used_up() -> None:
    decoding = Decoding(max_new_tokens=9, num_beams=2, no_repeat_ngram_size=1)
    search = make_search(decoding, prompt=np.array([0, 1], np.int32), end=None, decode=str)
    logits = np.log(np.array([[4, 3, 2, 1]], np.float32))
    moves = search.advance([logits])
    assert [move.tokens for move in moves] == [(2,), (3,)]
    moves = search.advance([logits] * 2)
    assert [(move.parent, move.tokens) for move in moves] == [(0, (3,)), (1, (2,))]
    with pytest.raises(FloatingPointError, match="the parameters forbid every one"):
        search.advance([logits] * 2)
