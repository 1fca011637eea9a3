"""Multiple choice: a question with any number of choices, each read with the question, apart from it, or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from typing_extensions import TypedDict

from mtserve.errors import InputError, Problem
from mtserve.rows import Floats, Row
from mtserve.tasks.base import (
    PLAIN,
    POOLING,
    TEMPERATURE,
    Example,
    HeadSpec,
    Kind,
    LossTerms,
    Options,
    PairPooling,
    Parameters,
)
from mtserve.tasks.measures import Metrics, Outcomes
from mtserve.tasks.scores import softmax
from mtserve.tasks.token_loss import divergence
from mtserve.tasks.windows import merge, merge_tensor
from mtserve.tasks.work import Work
from mtserve.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from mtserve.tasks.calibration import Calibration


_SCALE = 20.0
"""A cosine times this is a logit (Reimers and Gurevych's library has the same for its ranking loss)."""


class MultipleChoiceOptions(Options):
    method: Literal["joint", "cosine", "both"] = Field(
        default="joint",
        description="One output on the question with each choice, twenty times the cosine of the two encoded "
        "apart, or the mean of both.",
    )
    pooling: PairPooling | None = POOLING
    temperature: float = TEMPERATURE

    @model_validator(mode="after")
    def _pooling_fits(self) -> MultipleChoiceOptions:
        allowed = {"joint": None, "cosine": (None,), "both": (None, "pair")}[self.method]
        if allowed is not None and self.pooling not in allowed:
            raise ValueError(f"pooling {self.pooling} is not possible for {self.method}")
        return self


class MultipleChoiceParameters(Parameters):
    top_k: int | None = Field(default=None, ge=1, description="How many of the best choices to return; all by default.")


class MultipleChoiceExample(Example):
    question: str
    choices: tuple[str, ...] = Field(min_length=1, max_length=64)


class LabelledMultipleChoice(MultipleChoiceExample):
    answer: int = Field(ge=0, description="Index of the right choice.")

    @field_validator("answer", mode="before")
    @classmethod
    def _from_letter(cls, answer: Any) -> Any:
        """A letter counts from A, as in CommonsenseQA's `answerKey`."""
        return ord(answer) - ord("A") if isinstance(answer, str) and len(answer) == 1 and answer.isupper() else answer


class ChoiceScore(TypedDict):
    index: int
    choice: str
    score: float


class MultipleChoice(
    Kind[MultipleChoiceOptions, MultipleChoiceParameters, MultipleChoiceExample, LabelledMultipleChoice]
):
    name = "multiple_choice"
    options = MultipleChoiceOptions
    parameters = MultipleChoiceParameters
    example = MultipleChoiceExample
    labelled = LabelledMultipleChoice
    prediction = list[ChoiceScore]
    metric = "accuracy"
    loss_terms = frozenset({"label_smoothing", "r_drop"})
    takes_text = False

    def rows(self, example: MultipleChoiceExample, options: MultipleChoiceOptions, text: Text) -> list[Row]:
        """One row a choice (windows of it, where the question is long and the options say so); the question is cut. By
        cosine, behind them if there are any, the question and each choice alone."""
        limits, rows = options.limits, list[Row]()
        if options.method != "cosine":
            rows = [
                row
                for part, choice in enumerate(example.choices)
                for row in text.rows(example.question, choice, limits=limits, cut_first=True, part=part)
            ]
            shared = _shared(rows)
            rows = [replace(row, shared=shared) for row in rows]
        if options.method != "joint":
            before = len(example.choices) if rows else 0
            for part, one in enumerate((example.question, *example.choices), before):
                rows += text.rows(one, limits=limits, part=part)
        return rows

    def head(self, options: MultipleChoiceOptions) -> HeadSpec:
        if options.method == "cosine":
            return HeadSpec(architecture="pooling", pooling="mean")
        if options.method == "both":
            return HeadSpec(architecture="pair", labels=("score",), pooling="mean")
        return HeadSpec.of_rows("multiple_choice", options.pooling, labels=("score",))

    def target(self, example: LabelledMultipleChoice, rows: Sequence[Row], options: MultipleChoiceOptions) -> Any:
        if example.answer >= len(example.choices):
            found = f"{example.answer} is not the index of one of {len(example.choices)} choices"
            raise InputError(Problem(found, field="answer"))
        return example.answer

    def loss(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: MultipleChoiceOptions,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Cross entropy over the choices of an example, smoothed over those alone; mean over examples. With both
        methods the mean of what each alone costs."""
        import torch

        ways = _ways(merge_tensor(rows, logits), options)
        return torch.stack([_cost(scores, targets, terms) for scores in ways]).mean()

    def disagreement(
        self,
        logits: Tensor,
        other: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: MultipleChoiceOptions,
    ) -> Tensor:
        """Over the choices of an example; with both methods the mean of what each alone has."""
        import torch

        pairs = zip(*(_ways(merge_tensor(rows, each), options) for each in (logits, other)), strict=True)
        found = [divergence(a, b) for one, two in pairs for a, b in zip(one, two, strict=True)]
        return torch.stack(found).mean()

    def decode(self, work: Work, options: MultipleChoiceOptions, text: Text) -> list[ChoiceScore]:
        example, parameters = work.example, work.parameters
        assert isinstance(example, MultipleChoiceExample)
        assert isinstance(parameters, MultipleChoiceParameters)
        parts, ways = merge(work.prompt, work.logits), list[Floats]()
        if options.method != "cosine":
            ways.append(parts[: _choices(parts, options), 0])
        if options.method != "joint":
            ways.append(_SCALE * _cosines(*_apart(parts, options)))
        scores = softmax(np.mean(ways, 0) / np.float32(options.temperature))  # (choices,)
        order = np.argsort(-scores, kind="stable")[: parameters.top_k]
        return [ChoiceScore(index=int(i), choice=example.choices[i], score=float(scores[i])) for i in order]

    def calibrate(
        self,
        works: Sequence[Work],
        predictions: Sequence[list[ChoiceScore]],
        examples: Sequence[LabelledMultipleChoice],
        options: MultipleChoiceOptions,
    ) -> Calibration:
        from mtserve.tasks.calibration import by_class

        scores = np.zeros((len(predictions), max(map(len, predictions))))
        for number, prediction in enumerate(predictions):
            for one in prediction:
                scores[number, one["index"]] = max(one["score"], 1e-30)  # a choice that is there, however unlikely
        return by_class(scores, np.array([example.answer for example in examples]))

    def outcomes(
        self,
        predictions: Sequence[list[ChoiceScore]],
        examples: Sequence[LabelledMultipleChoice],
        options: MultipleChoiceOptions,
    ) -> Outcomes:
        """(examples,) true and given choices."""
        return np.array([e.answer for e in examples]), np.array([p[0]["index"] for p in predictions])

    def score(self, outcomes: Outcomes, options: MultipleChoiceOptions) -> Metrics:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(*outcomes))}

    def baseline(self, examples: Sequence[LabelledMultipleChoice], options: MultipleChoiceOptions) -> list[ChoiceScore]:
        index, count = Counter(e.answer for e in examples).most_common(1)[0]
        return [ChoiceScore(index=index, choice="", score=count / len(examples))]

    def truths(self, example: LabelledMultipleChoice, options: MultipleChoiceOptions) -> tuple[str, ...]:
        return (f"choice {example.answer}",)

    def flat_types(self, options: MultipleChoiceOptions) -> Mapping[str, Any]:
        """The best choice."""
        return {"choice": str, "index": int, "score": float}

    def flat(self, prediction: list[ChoiceScore], options: MultipleChoiceOptions) -> Mapping[str, Any]:
        best = prediction[0]
        return {"choice": best["choice"], "index": best["index"], "score": best["score"]}

    def sample(self, options: MultipleChoiceOptions) -> MultipleChoiceExample:
        return MultipleChoiceExample(
            question="What do you open when it starts to rain?", choices=("an umbrella", "a tin of soup", "a book")
        )


def _shared(rows: Sequence[Row]) -> int:
    """How many first tokens all rows have, of the same types; each row has at least one more."""
    most = min(map(len, rows)) - 1
    seen = np.stack([np.stack([row.ids[:most], row.type_ids[:most]]) for row in rows])  # (rows, 2, most)
    differs = (seen != seen[0]).any((0, 1))
    return int(differs.argmax()) if differs.any() else most


def _choices(parts: Any, options: MultipleChoiceOptions) -> int:
    """How many choices an example's parts speak of: with both methods one together, one apart, and the question."""
    return len(parts) // 2 if options.method == "both" else len(parts)


def _apart(parts: Any, options: MultipleChoiceOptions) -> tuple[Any, Any]:
    """(1, hidden) and (choices, hidden): the embeddings of question and choices, out of (parts, n_out)."""
    alone = parts[_choices(parts, options) :, 1:] if options.method == "both" else parts
    return alone[:1], alone[1:]


def _ways(parts: Sequence[Tensor], options: MultipleChoiceOptions) -> list[list[Tensor]]:
    """By each method, (choices,) scores an example, out of (parts, n_out) logits an example."""
    from torch.nn import functional

    ways = list[list[Any]]()
    if options.method != "cosine":
        ways.append([part[: _choices(part, options), 0] for part in parts])
    if options.method != "joint":
        apart = (_apart(part, options) for part in parts)
        ways.append([_SCALE * functional.cosine_similarity(one, other, dim=-1) for one, other in apart])
    return ways


def _cosines(one: Floats, others: Floats) -> Floats:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(others, axis=1)
    return np.asarray((others @ one[0]) / np.maximum(norms, 1e-8), np.float32)


def _cost(scores: Sequence[Tensor], targets: Sequence[Any], terms: LossTerms) -> Tensor:
    """Mean cross entropy, of (choices,) scores an example."""
    import torch
    from torch.nn import functional

    wanted = torch.as_tensor(targets, device=scores[0].device)
    if terms.label_smoothing:  # padding would take its share of the smoothing, and cost infinitely much
        pairs = zip(scores, wanted, strict=True)
        each = [functional.cross_entropy(s, w, label_smoothing=terms.label_smoothing) for s, w in pairs]
        return torch.stack(each).mean()
    padded = torch.nn.utils.rnn.pad_sequence([*scores], batch_first=True, padding_value=float("-inf"))
    return functional.cross_entropy(padded, wanted)
