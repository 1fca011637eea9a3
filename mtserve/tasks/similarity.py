"""Similarity of two texts as a bounded score: by regression on the pair, by cosine of the two pooled texts, or both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import TypedDict

from mtserve.errors import InputError, Problem
from mtserve.rows import Floats, Row
from mtserve.tasks.base import PLAIN, Example, HeadSpec, Item, Kind, LossTerms, Options, PairPooling, Parameters
from mtserve.tasks.measures import Metrics, Outcomes
from mtserve.tasks.validation import validate
from mtserve.tasks.windows import merge, merge_tensor
from mtserve.tasks.work import Work
from mtserve.text import Text

if TYPE_CHECKING:
    from torch import Tensor


class SimilarityOptions(Options):
    method: Literal["regression", "cosine", "both"] = Field(
        default="regression",
        description="One output on the pair, cosine of the two texts encoded apart, or the mean of both.",
    )
    low: float = Field(default=0.0, description="Score of texts that have nothing in common.")
    high: float = Field(default=1.0, description="Score of texts that mean the same.")
    pooling: Literal["mean"] | PairPooling | None = Field(
        default=None,
        description="State that stands for a row. For cosine mean (the default), first or last; for regression the "
        "one that the head reads, which training finds out and says, or pair: what both texts are to each "
        "other as a whole and token by token; both is always by pair and mean.",
    )

    @property
    def embedding(self) -> Literal["mean", "first", "last"]:
        """For cosine: which states make the text's embedding."""
        return self.pooling if self.pooling in ("first", "last") else "mean"

    @model_validator(mode="after")
    def _pooling_fits(self) -> SimilarityOptions:
        wrong = {
            "regression": ("mean",),
            "cosine": ("pooled", "pair"),
            "both": ("mean", "first", "last", "pooled"),
        }[self.method]
        if self.pooling in wrong:
            raise ValueError(f"pooling {self.pooling} is not possible for {self.method}")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> SimilarityOptions:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be less than high {self.high}")
        return self


class SimilarityParameters(Parameters):
    pass


class SimilarityExample(Example):
    text: str
    text_pair: str


class LabelledSimilarity(SimilarityExample):
    score: float


class Sentences(Example):
    """One sentence against several, as sentence-similarity clients send it."""

    source_sentence: str
    sentences: list[str] = Field(min_length=1)


class Score(TypedDict):
    score: float


class Similarity(Kind[SimilarityOptions, SimilarityParameters, SimilarityExample, LabelledSimilarity]):
    name = "similarity"
    options = SimilarityOptions
    parameters = SimilarityParameters
    example = SimilarityExample
    labelled = LabelledSimilarity
    prediction = Score
    metric = "pearson"
    takes_text = False
    loss_terms = frozenset({"r_drop"})

    def rows(self, example: SimilarityExample, options: SimilarityOptions, text: Text) -> list[Row]:
        pair, limits, rows = options.method != "cosine", options.limits, list[Row]()
        if pair:
            rows = text.rows(example.text, example.text_pair, limits=limits)
        if options.method != "regression":
            for part, one in enumerate((example.text, example.text_pair), int(pair)):
                rows += text.rows(one, limits=limits, part=part)
        return rows

    def head(self, options: SimilarityOptions) -> HeadSpec:
        if options.method == "cosine":
            return HeadSpec(architecture="pooling", pooling=options.embedding)
        if options.method == "both":
            return HeadSpec(architecture="pair", labels=("score",), pooling="mean")
        reads = None if options.pooling == "mean" else options.pooling
        return HeadSpec.of_rows("sequence_classification", reads, labels=("score",), problem_type="regression")

    def target(self, example: LabelledSimilarity, rows: Sequence[Row], options: SimilarityOptions) -> Any:
        if not options.low <= example.score <= options.high:
            raise InputError(Problem(f"{example.score} is not in [{options.low}, {options.high}]", field="score"))
        return (example.score - options.low) / (options.high - options.low)

    def loss(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: SimilarityOptions,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Squared error on the scale [0, 1]: of the output itself, of the cosine (Reimers and Gurevych, 2019), or the
        mean of the two errors."""
        import torch

        guesses = _guesses(merge_tensor(rows, logits), options)  # (methods, examples)
        wanted = torch.as_tensor(targets, dtype=guesses.dtype, device=guesses.device)
        return (guesses - wanted).square().mean()

    def disagreement(
        self,
        logits: Tensor,
        other: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: SimilarityOptions,
    ) -> Tensor:
        """The squared difference on the scale [0, 1], of each method's guess."""
        one, two = (_guesses(merge_tensor(rows, each), options) for each in (logits, other))
        return (one - two).square().mean()

    def decode(self, work: Work, options: SimilarityOptions, text: Text) -> Score:
        parts = merge(work.prompt, work.logits)
        guesses = [] if options.method == "cosine" else [float(parts[0, 0])]
        if options.method != "regression":
            guesses.append(_cosine(*_embeddings(parts[None], options)))
        share = sum(min(max(guess, 0.0), 1.0) for guess in guesses) / len(guesses)
        return Score(score=options.low + (options.high - options.low) * share)

    def outcomes(
        self, predictions: Sequence[Score], examples: Sequence[LabelledSimilarity], options: SimilarityOptions
    ) -> Outcomes:
        """(examples,) true and given scores."""
        return np.array([e.score for e in examples]), np.array([p["score"] for p in predictions])

    def score(self, outcomes: Outcomes, options: SimilarityOptions) -> Metrics:
        """Pearson's and Spearman's correlation."""
        from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr

        if not np.ptp(outcomes, axis=1).all():
            return {"pearson": 0.0, "spearman": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateDataWarning)  # scores that are nearly equal
            return {"pearson": float(pearsonr(*outcomes)[0]), "spearman": float(spearmanr(*outcomes)[0])}

    def baseline(self, examples: Sequence[LabelledSimilarity], options: SimilarityOptions) -> Score:
        return Score(score=float(np.mean([e.score for e in examples])))

    def truths(self, example: LabelledSimilarity, options: SimilarityOptions) -> tuple[str, ...]:
        """The fifth of the range that the score is in."""
        step = (options.high - options.low) / 5
        start = options.low + step * min(int((example.score - options.low) / step), 4)
        return (f"{start:g} to {start + step:g}",)

    def flat_types(self, options: SimilarityOptions) -> Mapping[str, Any]:
        return {"score": float}

    def flat(self, prediction: Score, options: SimilarityOptions) -> Mapping[str, Any]:
        return {"score": prediction["score"]}

    def sample(self, options: SimilarityOptions) -> SimilarityExample:
        return SimilarityExample(text="A man is feeding his dog.", text_pair="Someone gives food to a pet.")

    def input_models(self) -> list[type[Any]]:
        return [SimilarityExample, Sentences]

    def split(self, inputs: Any) -> tuple[list[Item], str]:
        if isinstance(inputs, dict) and "source_sentence" in inputs:
            asked = validate(Sentences, inputs)
            pairs = [{"text": asked.source_sentence, "text_pair": other} for other in asked.sentences]
            return pairs, "scores"
        return super().split(inputs)

    def join(self, predictions: list[Any], shape: str) -> Any:
        return [p["score"] for p in predictions] if shape == "scores" else super().join(predictions, shape)


def _embeddings(parts: Any, options: SimilarityOptions) -> tuple[Any, Any]:
    """(examples, hidden) each: of both texts, out of (examples, parts, n_out). With both methods the pair's own part
    comes first, and the output before the embedding."""
    if options.method == "both":
        return parts[:, 1, 1:], parts[:, 2, 1:]
    return parts[:, 0], parts[:, 1]


def _guesses(parts: Sequence[Tensor], options: SimilarityOptions) -> Tensor:
    """(methods, examples) on the scale [0, 1], out of (parts, n_out) logits an example."""
    import torch
    from torch.nn import functional

    stacked = torch.stack([*parts])  # (examples, parts, n_out)
    guesses = [] if options.method == "cosine" else [stacked[:, 0, 0]]
    if options.method != "regression":
        one, other = _embeddings(stacked, options)
        guesses.append(functional.cosine_similarity(one, other, dim=-1))
    return torch.stack(guesses)


def _cosine(a: Floats, b: Floats) -> float:
    """Of (1, hidden) each."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a[0] @ b[0]) / norms if norms > 0 else 0.0
