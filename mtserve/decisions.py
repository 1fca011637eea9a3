"""What a prediction decides, and whether two predictions decide otherwise: the one notion of a flip. Knows no model.

| kind | decided is |
|---|---|
| classification | the best label; of a multi-label task the labels that hold, each from its own threshold |
| multiple choice | the best choice |
| token classification | the spans: their limits and labels |
| generation | the texts, and why they ended |
| a score alone (similarity) | the score: another one if it moved by more than 1 % of its range |

Scores beside a decision are not part of it. A kind that is not in the table decides by all that it predicts but for
scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtserve.tasks.base import Options
from mtserve.tasks.classification import ClassificationOptions
from mtserve.tasks.multiple_choice import MultipleChoiceOptions

MOVED = 0.01
"""Share of its range by which a score moves to be another one."""
_SLACK = 1e-9  # a move of exactly that share is none, however it is rounded


def flipped(one: Any, other: Any, options: Options) -> bool:
    """Whether two predictions of a task with these options decide otherwise; an error does from any prediction."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return type(one) is not type(other)
    if isinstance(one, dict) and set(one) == {"score"}:
        span = float(getattr(options, "high", 1.0) - getattr(options, "low", 0.0))
        moved = abs(float(one["score"]) - float(other["score"]))
        return not moved <= (MOVED + _SLACK) * span  # NaN flips too
    return bool(_decided(one, options) != _decided(other, options))


def _decided(prediction: Any, options: Options) -> Any:
    if isinstance(options, ClassificationOptions):
        if options.multi_label:
            limits = dict(zip(options.labels, options.limits_of_labels, strict=True))
            return {one["label"] for one in prediction if one["score"] >= limits[one["label"]]}
        return max(prediction, key=lambda one: one["score"])["label"]
    if isinstance(options, MultipleChoiceOptions):
        return prediction[0]["index"]
    return list(_leaves(prediction))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "score":
                yield from _leaves(inner)
    elif isinstance(value, list):
        yield len(value)
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
