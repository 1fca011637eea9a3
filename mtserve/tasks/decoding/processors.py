"""What happens to logits before a token is chosen, one function a parameter, and the choice. Each on one sequence.

Order and formulas are those of the classes of the same names in Transformers' `generation/logits_process.py`. All take
and return (vocab,) float32 and leave what they are given as it is.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mtserve.rows import Bools, Floats, Ints
from mtserve.tasks.decoding.parameters import Decoding


def processed(logits: Floats, ids: Ints, decoding: Decoding, *, made: int, end: int | None) -> Floats:
    """Logits as the parameters change them; the same array where they change nothing.

    ids: (len,) prompt and answer so far, of which `made` tokens are the answer's. end: the token that ends it.
    """
    scores = logits
    if decoding.repetition_penalty != 1:
        scores = repetition_penalty(scores, ids, decoding.repetition_penalty)
    if decoding.no_repeat_ngram_size:
        scores = no_repeat_ngram(scores, ids, decoding.no_repeat_ngram_size)
    if end is not None and made < decoding.min_new_tokens:
        scores = scores.copy()
        scores[end] = -np.inf
    if decoding.do_sample:
        if decoding.temperature != 1:
            scores = scores / np.float32(decoding.temperature)
        if decoding.top_k:
            scores = top_k(scores, decoding.top_k)
        if decoding.top_p < 1:
            scores = top_p(scores, decoding.top_p)
        if decoding.min_p > 0:
            scores = min_p(scores, decoding.min_p)
    return scores


def repetition_penalty(scores: Floats, ids: Ints, penalty: float) -> Floats:
    """Tokens that occur become less likely: Keskar et al., 2019 (CTRL)."""
    seen = ids[ids < len(scores)]
    changed = scores.copy()
    changed[seen] = np.where(scores[seen] < 0, scores[seen] * np.float32(penalty), scores[seen] / np.float32(penalty))
    return changed


def no_repeat_ngram(scores: Floats, ids: Ints, size: int) -> Floats:
    """No n-gram occurs twice: Paulus et al., 2017."""
    if len(ids) < size:
        return scores
    windows = sliding_window_view(ids, size)
    banned = windows[(windows[:, :-1] == ids[len(ids) + 1 - size :]).all(axis=1), -1]
    changed = scores.copy()
    changed[banned[banned < len(scores)]] = -np.inf
    return changed


def top_k(scores: Floats, number: int) -> Floats:
    """Only the likeliest tokens, and those level with the last of them: Fan et al., 2018."""
    if number >= len(scores):
        return scores
    return _only(scores, scores >= np.partition(scores, -number)[-number])


def top_p(scores: Floats, share: float) -> Floats:
    """The fewest likeliest tokens that have this share together, and those level with the last: Holtzman et al., 2019.

    Tokens below (1 - share) / vocab cannot be among them, so that only the others, a few hundred, are sorted.
    """
    shares = softmax(scores)
    unlikely = shares < min(np.float32((1 - share) / len(shares)), shares.max())
    likely = np.sort(shares[~unlikely])
    gone = np.cumsum(likely) + shares[unlikely].sum() <= 1 - share
    gone[-1] = False
    return _only(scores, shares >= likely[np.argmin(gone)])


def min_p(scores: Floats, share: float) -> Floats:
    """Only tokens with this share of the likeliest one's probability: Nguyen et al., 2024."""
    shares = softmax(scores)
    return _only(scores, shares >= np.float32(share) * shares.max())


def best(scores: Floats) -> int:
    """The likeliest token; the first of several. Like all below, raises FloatingPointError where none can be chosen."""
    token = int(np.argmax(scores))  # a NaN, if there is one
    if not np.isfinite(scores[token]):
        raise FloatingPointError(f"no token can be chosen: the largest logit is {scores[token]}, not a finite number")
    return token


def draw(scores: Floats, rng: np.random.Generator) -> int:
    """A token at random, by its probability."""
    upto = np.cumsum(softmax(scores), dtype=np.float64)
    return int(np.searchsorted(upto / upto[-1], rng.random(), side="right"))  # never one of probability 0


def softmax(scores: Floats) -> Floats:
    """(vocab,) probabilities."""
    return np.exp(log_softmax(scores))


def log_softmax(scores: Floats) -> Floats:
    """(vocab,) logarithms of the probabilities."""
    shifted: Floats = scores - scores[best(scores)]
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _only(scores: Floats, kept: Bools) -> Floats:
    return np.where(kept, scores, np.float32(-np.inf))
