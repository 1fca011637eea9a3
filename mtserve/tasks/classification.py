"""Classification of one text or of a pair, with one label of several or with any number of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from typing_extensions import TypedDict

from mtserve.errors import InputError, Problem
from mtserve.rows import Row
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
from mtserve.tasks.measures import LabelScores, Metrics, Outcomes, label_report
from mtserve.tasks.scores import sigmoid, softmax
from mtserve.tasks.token_loss import divergence
from mtserve.tasks.windows import merge, merge_tensor
from mtserve.tasks.work import Work
from mtserve.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from mtserve.tasks.calibration import Calibration


class ClassificationOptions(Options):
    labels: tuple[str, ...] = Field(min_length=1, description="Label names in the order of the head's outputs.")
    multi_label: bool = Field(default=False, description="Any number of labels may hold at once.")
    pooling: PairPooling | None = POOLING
    temperature: float = TEMPERATURE
    thresholds: tuple[float, ...] | None = Field(
        default=None, description="Of a multi-label task: from which score each label holds; 0.5 by default. Fitted."
    )

    @property
    def limits_of_labels(self) -> tuple[float, ...]:
        """From which score each label holds."""
        return self.thresholds or (0.5,) * len(self.labels)

    @model_validator(mode="after")
    def _thresholds_fit(self) -> ClassificationOptions:
        if self.thresholds is not None and not (self.multi_label and len(self.thresholds) == len(self.labels)):
            found = f"{len(self.thresholds)} thresholds for {len(self.labels)} labels, multi_label {self.multi_label}"
            raise ValueError(f"{found}; allowed: one for each label of a multi-label task")
        return self

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError(f"labels must be distinct; found {', '.join(labels)}")
        return labels


class ClassificationParameters(Parameters):
    top_k: int | None = Field(default=None, ge=1, description="How many of the best labels to return; all by default.")
    threshold: float | None = Field(default=None, ge=0, le=1, description="Leave out labels that score less.")
    decided: bool = Field(default=False, description="Of a multi-label task: only the labels that hold.")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        default=None, description="From logits to scores; by default softmax, or sigmoid for a multi-label task."
    )


class ClassificationExample(Example):
    text: str
    text_pair: str | None = None


class LabelledClassification(ClassificationExample):
    label: str | tuple[str, ...]

    @field_validator("label", mode="before")
    @classmethod
    def _as_text(cls, label: Any) -> Any:
        """Whole numbers and booleans are label names too, as CSV and JSON files have them."""
        if isinstance(label, list | tuple):
            return [str(one) if isinstance(one, int) else one for one in label]
        return str(label) if isinstance(label, int) else label


class LabelScore(TypedDict):
    label: str
    score: float


class Classification(
    Kind[ClassificationOptions, ClassificationParameters, ClassificationExample, LabelledClassification]
):
    name = "classification"
    options = ClassificationOptions
    parameters = ClassificationParameters
    example = ClassificationExample
    labelled = LabelledClassification
    prediction = list[LabelScore]
    metric = "macro_f1"
    label_field = "label"
    loss_terms = frozenset({"label_smoothing", "class_weights", "r_drop"})

    def rows(self, example: ClassificationExample, options: ClassificationOptions, text: Text) -> list[Row]:
        return text.rows(example.text, example.text_pair, limits=options.limits)

    def head(self, options: ClassificationOptions) -> HeadSpec:
        problem = "multi_label_classification" if options.multi_label else "single_label_classification"
        return HeadSpec.of_rows("sequence_classification", options.pooling, labels=options.labels, problem_type=problem)

    def fit(self, examples: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
        fitted = dict(options)
        if "labels" not in fitted:
            found: set[str] = set()
            for record in examples:
                label = record["label"]
                found.update(map(str, label) if isinstance(label, list | tuple) else [str(label)])
            fitted["labels"] = sorted(found)
        return fitted

    def classes(self, options: ClassificationOptions) -> Mapping[str, tuple[str, ...]]:
        return {"label": options.labels}

    def target(self, example: LabelledClassification, rows: Sequence[Row], options: ClassificationOptions) -> Any:
        names = [example.label] if isinstance(example.label, str) else list(example.label)
        unknown = [name for name in names if name not in options.labels]
        if unknown:
            raise InputError(Problem(f"{unknown[0]!r} is not among {', '.join(options.labels)}", field="label"))
        indexes = [options.labels.index(name) for name in names]
        if options.multi_label:
            return np.isin(np.arange(len(options.labels)), indexes).astype(np.float32)
        if len(indexes) != 1:
            raise InputError(Problem(f"one label is wanted, found {len(indexes)}", field="label"))
        return indexes[0]

    def loss(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: ClassificationOptions,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Cross entropy; of several labels at once the mean over examples and labels, where a class weight scales both
        sides of its label, and smoothing moves 0 and 1 towards 1/2."""
        import torch
        from torch.nn import functional

        merged = torch.cat(merge_tensor(rows, logits))  # (examples, n_out)
        wanted = torch.as_tensor(np.stack(targets), device=logits.device)
        smooth, weight = terms.label_smoothing, terms.class_weights
        weights = None if weight is None else merged.new_tensor(weight)
        if options.multi_label:
            shares = wanted.to(merged.dtype) * (1 - smooth) + smooth / 2
            return functional.binary_cross_entropy_with_logits(merged, shares, weights)
        return functional.cross_entropy(merged, wanted.long(), weights, label_smoothing=smooth)

    def disagreement(
        self,
        logits: Tensor,
        other: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: ClassificationOptions,
    ) -> Tensor:
        """Of several labels at once the mean over examples and labels, as their loss is."""
        import torch

        one, two = (torch.cat(merge_tensor(rows, each)) for each in (logits, other))  # (examples, n_out)
        found = divergence(one, two, sigmoid=options.multi_label).mean()
        return found / one.shape[1] if options.multi_label else found

    def decode(self, work: Work, options: ClassificationOptions, text: Text) -> list[LabelScore]:
        parameters = work.parameters
        assert isinstance(parameters, ClassificationParameters)
        logits = merge(work.prompt, work.logits)[0]  # (n_out,)
        if parameters.function_to_apply != "none":
            logits = logits / np.float32(options.temperature)
        function = parameters.function_to_apply or ("sigmoid" if options.multi_label else "softmax")
        scores = logits if function == "none" else (sigmoid(logits) if function == "sigmoid" else softmax(logits))
        order = np.argsort(-scores, kind="stable")[: parameters.top_k]
        limits = options.limits_of_labels if parameters.decided and options.multi_label else None
        if limits is not None:
            order = np.array([i for i in order if scores[i] >= limits[i]], np.int64)
        ranked = [LabelScore(label=options.labels[i], score=float(scores[i])) for i in order]
        return [r for r in ranked if parameters.threshold is None or r["score"] >= parameters.threshold]

    def calibrate(
        self,
        works: Sequence[Work],
        predictions: Sequence[list[LabelScore]],
        examples: Sequence[LabelledClassification],
        options: ClassificationOptions,
    ) -> Calibration:
        from mtserve.tasks.calibration import by_class, by_label

        at = {label: index for index, label in enumerate(options.labels)}
        scores = np.zeros((len(predictions), len(at)))
        true = np.zeros((len(predictions), len(at)), np.int64)
        for number, (prediction, example) in enumerate(zip(predictions, examples, strict=True)):
            for one in prediction:
                scores[number, at[one["label"]]] = one["score"]
            true[number, [at[label] for label in self.truths(example, options)]] = 1
        return by_label(scores, true) if options.multi_label else by_class(scores, true.argmax(axis=1))

    def outcomes(
        self,
        predictions: Sequence[list[LabelScore]],
        examples: Sequence[LabelledClassification],
        options: ClassificationOptions,
    ) -> Outcomes:
        """True and given: (examples,) numbers of labels, or in the multi-label case sparse (examples, labels + 1) of 0
        and 1, whose last column is empty, since scikit-learn takes a single column for one of two labels."""
        true = [self.truths(example, options) for example in examples]
        if not options.multi_label:
            index, best = options.labels.index, [max(p, key=lambda one: one["score"])["label"] for p in predictions]
            return np.array([index(name) for (name,) in true]), np.array([index(name) for name in best])
        from sklearn.preprocessing import MultiLabelBinarizer

        hot = MultiLabelBinarizer(classes=[*options.labels, None], sparse_output=True)
        limits = dict(zip(options.labels, options.limits_of_labels, strict=True))
        likely = [[p["label"] for p in prediction if p["score"] >= limits[p["label"]]] for prediction in predictions]
        return hot.fit_transform(true), hot.fit_transform(likely)

    def score(self, outcomes: Outcomes, options: ClassificationOptions) -> Metrics:
        """Accuracy (of whole label sets in the multi-label case), F1 as the mean over the labels that are true or given
        at all, and Matthews' coefficient, or for a multi-label task F1 over all decisions together."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        found = {"accuracy": accuracy_score(*outcomes)}
        found["macro_f1"] = np.nan_to_num(f1_score(*outcomes, average="macro", zero_division=np.nan))
        if options.multi_label:
            found["micro_f1"] = f1_score(*outcomes, average="micro", zero_division=0)
        else:
            found["mcc"] = matthews_corrcoef(*outcomes) if len(np.unique(outcomes)) > 1 else 0
        return {name: float(value) for name, value in found.items()}

    def report(self, outcomes: Outcomes, options: ClassificationOptions) -> dict[str, LabelScores]:
        from sklearn.metrics import precision_recall_fscore_support

        labels = np.arange(len(options.labels))
        return label_report(options.labels, precision_recall_fscore_support(*outcomes, labels=labels, zero_division=0))

    def confusion(self, outcomes: Outcomes, options: ClassificationOptions) -> list[list[int]] | None:
        from sklearn.metrics import confusion_matrix

        if options.multi_label:
            return None
        matrix: list[list[int]] = confusion_matrix(*outcomes, labels=np.arange(len(options.labels))).tolist()
        return matrix

    def baseline(self, examples: Sequence[LabelledClassification], options: ClassificationOptions) -> list[LabelScore]:
        counts = Counter(name for e in examples for name in ([e.label] if isinstance(e.label, str) else e.label))
        scores = {name: counts[name] / max(len(examples), 1) for name in options.labels}
        return [LabelScore(label=n, score=s) for n, s in sorted(scores.items(), key=lambda item: -item[1])]

    def truths(self, example: LabelledClassification, options: ClassificationOptions) -> tuple[str, ...]:
        return (example.label,) if isinstance(example.label, str) else example.label

    def sample(self, options: ClassificationOptions) -> ClassificationExample:
        return ClassificationExample(text="The parcel arrived two days late, but the support team was kind.")

    def join(self, predictions: list[Any], shape: str) -> Any:
        return predictions  # a list of lists in both shapes: clients read element 0 for one text

    def flat_types(self, options: ClassificationOptions) -> Mapping[str, Any]:
        """The best label and its score; of a multi-label task the labels that hold."""
        return {"labels": list[str]} if options.multi_label else {"label": str, "score": float}

    def flat(self, prediction: list[LabelScore], options: ClassificationOptions) -> Mapping[str, Any]:
        if options.multi_label:
            limits = dict(zip(options.labels, options.limits_of_labels, strict=True))
            return {"labels": [one["label"] for one in prediction if one["score"] >= limits[one["label"]]]}
        best = prediction[0] if prediction else {"label": None, "score": None}
        return {"label": best["label"], "score": best["score"]}

    def label_names(self, options: ClassificationOptions) -> tuple[str, ...]:
        return options.labels
