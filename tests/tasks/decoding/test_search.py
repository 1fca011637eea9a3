"""Greedy, sampling, prompt lookup and stop strings, against Transformers' `generate` and against themselves."""

from __future__ import annotations

from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtserve.tasks.decoding import Decoding, Move, make_search
from mtserve.tasks.decoding.independent import lookup
from tests.tasks.decoding.drive import PROMPTS, answers, drive, forward, model, words
from tests.tiny import EOS, PAD, VOCAB


def generate(family: str, prompt: list[int], **values: Any) -> Any:
    return model(family).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS, **values},
        return_dict_in_generate=True,
        output_scores=True,
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "values", [{}, {"repetition_penalty": 1.5, "min_new_tokens": 6}, {"no_repeat_ngram_size": 2, "max_new_tokens": 20}]
)
def test_greedy_equals_generate_with_its_score(family: str, values: dict[str, Any]) -> None:
    made = set()
    for prompt in PROMPTS:
        theirs = generate(family, prompt, **values)
        tokens = theirs.sequences[0, len(prompt) :].tolist()
        search = drive(forward(family), prompt, logprobs=True, **values)
        (answer,) = search.answers
        assert list(answer.tokens) == [token for token in tokens if token != EOS]
        assert answer.finish_reason == ("eos_token" if EOS in tokens else "length")
        scores = model(family).compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)[0]
        assert answer.score == pytest.approx(float(scores.sum()), abs=1e-4)
        assert search.logprobs == pytest.approx(scores.tolist(), abs=1e-4)
        made.add(answer.tokens)
    assert len(made) > 1


def test_an_end_token_ends() -> None:
    first, second, third = answers(forward("gpt2"), PROMPTS[0])[0].tokens[:3]
    seen: list[Any] = []
    decoding = Decoding(max_new_tokens=3)
    search = make_search(decoding, prompt=np.array(PROMPTS[0], np.int32), end=third, decode=words)
    moves = search.advance([forward("gpt2")([PROMPTS[0]])[0][-1:]])
    while moves:
        seen.append((search.tokens, search.finish_reason))
        moves = search.advance([forward("gpt2")([[*PROMPTS[0], *search.tokens]])[0][-1:]])
    assert seen == [((first,), None), ((first, second), None)]
    (answer,) = search.answers
    assert (answer.tokens, answer.finish_reason) == ((first, second), "eos_token"), "the end token counts"
    assert search.finish_reason == "eos_token"
    assert isnan(answer.score)
    assert search.logprobs == ()


SAMPLING = {"do_sample": True, "temperature": 2.0, "top_k": 40, "output_scores": True}


def test_samples_do_not_depend_on_what_runs_beside_them() -> None:
    run, prompt = forward("llama", bias=4.0), PROMPTS[2]
    many = drive(run, prompt, **SAMPLING, num_return_sequences=6, seed=5).answers
    again = drive(run, prompt, **SAMPLING, num_return_sequences=6, seed=5).answers
    few = drive(run, prompt, **SAMPLING, num_return_sequences=2, seed=5).answers
    other = drive(run, prompt, **SAMPLING, num_return_sequences=6, seed=6).answers
    assert many == again != other
    assert len({answer.tokens for answer in many}) == 6
    assert {answer.tokens for answer in few} < {answer.tokens for answer in many}
    assert len({len(answer.tokens) for answer in many}) > 1, "some are to end before others"
    scores = [answer.score for answer in many]
    assert scores == sorted(scores, reverse=True)
    fresh = {drive(run, prompt, **SAMPLING).answers[0].tokens for _ in range(4)}
    assert len(fresh) > 1


def test_samples_follow_the_probabilities() -> None:
    logits = np.full((1, 6), -9, np.float32)
    logits[0, [2, 3]] = np.log([0.3, 0.7]).astype(np.float32) / 2
    decoding = Decoding(max_new_tokens=1, do_sample=True, temperature=0.5, top_k=2, num_return_sequences=2000, seed=1)
    search = make_search(decoding, prompt=np.zeros(1, np.int32), end=None, decode=words)
    assert search.advance([logits]) == []
    drawn = np.bincount([answer.tokens[0] for answer in search.answers], minlength=6)
    assert drawn[2] + drawn[3] == 2000
    assert abs(drawn[3] / 2000 - 0.7) < 0.04
    assert search.answers[0].score == pytest.approx(np.log(0.7), abs=1e-4)


def test_several_are_read_only_after_the_end() -> None:
    seen: list[Any] = []
    watch = lambda search: seen.append((search.tokens, search.finish_reason))  # noqa: E731
    search = drive(forward("gpt2"), PROMPTS[0], do_sample=True, num_return_sequences=2, seed=1, watch=watch)
    assert set(seen[:-1]) == {((), None)}
    assert seen[-1] == (search.answers[0].tokens, search.answers[0].finish_reason)


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.lists(st.integers(5, 9), min_size=1, max_size=14),
    number=st.integers(1, 8),
    most=st.integers(1, 16),
    extra=st.sampled_from([{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}, {"stop_strings": ("e",)}]),
    seed=st.integers(0, 2),
)
def test_prompt_lookup_changes_nothing(
    prompt: list[int], number: int, most: int, extra: dict[str, Any], seed: int
) -> None:
    run = forward("gpt2", seed=seed)
    moves: list[list[Move]] = []
    guessed = drive(run, prompt, max_new_tokens=most, prompt_lookup_num_tokens=number, moves_of=moves, **extra)
    assert guessed.answers[0].tokens == answers(run, prompt, max_new_tokens=most, **extra)[0].tokens
    assert guessed.answers[0].finish_reason == answers(run, prompt, max_new_tokens=most, **extra)[0].finish_reason
    made = 0
    for (move,) in moves:
        made += len(move.tokens)
        assert len(move.guesses) <= number
        assert made + len(move.guesses) < most


def test_prompt_lookup_saves_passes_where_an_answer_repeats() -> None:
    """A model that counts round and round: every guess is right, and n tokens come at once."""

    def run(sequences: list[list[int]]) -> list[np.ndarray]:
        return [np.eye(VOCAB, dtype=np.float32)[[5 + (i - 4) % 6 for i in ids]] for ids in sequences]

    moves: list[list[Move]] = []
    search = drive(run, [5, 6, 7, 8, 9, 10, 5], max_new_tokens=20, prompt_lookup_num_tokens=4, moves_of=moves)
    assert search.answers[0].tokens == tuple(5 + (1 + i) % 6 for i in range(20))
    assert [len(move.tokens) for (move,) in moves] == [1, 5, 5, 5]
    assert moves[0] == [Move(0, (6,), (7, 8, 9, 10))]


@pytest.mark.parametrize(
    ("ids", "most", "guesses"),
    [
        ([1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3], 2, (8, 7)),
        ([1, 2, 3, 9, 5, 2, 3, 8, 7, 1, 2, 3], 2, (9, 5)),
        ([3, 6, 1, 3], 9, (6, 1, 3)),
        ([3, 6, 0, 3], 9, (6,)),
        ([3, 3, 3, 3], 9, (3,)),
        ([3, 6, 1, 3], 0, ()),
        ([1, 2, 3], 4, ()),
        ([1], 4, ()),
    ],
)
def test_guesses(ids: list[int], most: int, guesses: tuple[int, ...]) -> None:
    assert lookup(np.array(ids, np.int32), most, 0) == guesses


def test_stop_strings_cut_the_text_and_not_the_tokens() -> None:
    run, prompt = forward("gpt2"), PROMPTS[3]
    (plain,) = answers(run, prompt, max_new_tokens=10)
    pieces = [words([token]) for token in plain.tokens]
    stop = f"{pieces[3]} {pieces[4][:1]}"
    (answer,) = answers(run, prompt, max_new_tokens=10, stop_strings=("never", stop))
    assert answer.tokens == plain.tokens[: len(answer.tokens)]
    assert answer.finish_reason == "stop_sequence"
    assert stop in words(list(answer.tokens))
    assert stop not in words(list(answer.tokens[:-1]))
    assert words(list(answer.tokens)).startswith(answer.text + stop)
    (last,) = answers(run, prompt, max_new_tokens=len(answer.tokens), stop_strings=(stop,))
    assert last.finish_reason == "stop_sequence", "also where the length would end it"


@pytest.mark.parametrize("values", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_logits_that_are_no_numbers(values: dict[str, Any]) -> None:
    search = make_search(Decoding(max_new_tokens=3, **values), prompt=np.ones(2, np.int32), end=EOS, decode=words)
    with pytest.raises(FloatingPointError, match="no token can be chosen"):
        search.advance([np.full((1, 20), np.nan, np.float32)])
