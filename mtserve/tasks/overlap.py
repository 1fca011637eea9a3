"""How far generated text overlaps its reference and its source: BLEU, chrF, PINC, copies. Knows no kind and no model.

BLEU (Papineni et al., 2002) and chrF2 (Popović, 2015) are sacreBLEU's (Post, 2018), in [0, 1] instead of [0, 100].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtserve.tasks.measures import Metrics, Outcomes

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

_PINC_ORDERS = (1, 2, 3, 4)
_SHARES = ("pinc", "copy_rate", "exact_match")


def overlap_outcomes(texts: Sequence[str], sources: Sequence[str], targets: Sequence[str]) -> Outcomes:
    """What `overlap_score` needs of each example: (examples, counts) for each metric of sacreBLEU, in the order of
    `signatures`, and (examples, 3) of PINC, whether the text is its source, and whether it is its target.

    PINC (Chen and Dolan, 2011): the share of the text's distinct n-grams that its source lacks, meant over the n of 1
    to 4 that the text has, of lower-cased 13a tokens; 0 for an empty text. A copy may differ from its source in case
    and in spaces around it, an exact match from its target in spaces around it.
    """
    metrics = _metrics()
    split = metrics["bleu_lower"]._preprocess_segment
    shares = []
    for text, source, target in zip(texts, sources, targets, strict=True):
        new = _pinc(split(text).split(), split(source).split())
        shares.append((new, text.strip().lower() == source.strip().lower(), text.strip() == target.strip()))
    # what sacreBLEU's own bootstrap resamples
    counts = (np.array(one._extract_corpus_statistics(texts, [targets])) for one in metrics.values())
    return *counts, np.array(shares, np.float64)


def overlap_score(outcomes: Outcomes) -> Metrics:
    """Corpus-level `bleu` (cased), `bleu_lower` (lower-cased) and `chrf`; means of `pinc`, `copy_rate`, `exact_match`.

    All in [0, 1]; an empty text counts as one that shares nothing.
    """
    *counts, shares = outcomes
    found = {
        name: metric._compute_score_from_stats(count.sum(0).tolist()).score / 100
        for (name, metric), count in zip(_metrics().items(), counts, strict=True)
    }
    return found | {name: float(mean) for name, mean in zip(_SHARES, shares.mean(0), strict=True)}


def signatures() -> dict[str, str]:
    """sacreBLEU's signature of each of its metrics: all settings and the version, for whoever compares scores."""
    found = {}
    for name, metric in _metrics().items():
        metric.corpus_score(["a"], [["a"]])  # how many references there are is part of a signature
        found[name] = str(metric.get_signature())
    return found


def _metrics() -> dict[str, Metric]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU(force=True), "bleu_lower": BLEU(lowercase=True, force=True), "chrf": CHRF()}


def _pinc(text: Sequence[str], source: Sequence[str]) -> float:
    new = []
    for order in _PINC_ORDERS:
        own, other = (set(zip(*(tokens[at:] for at in range(order)), strict=False)) for tokens in (text, source))
        if own:
            new.append(len(own - other) / len(own))
    return sum(new) / len(new) if new else 0.0
