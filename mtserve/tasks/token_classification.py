"""Token classification: spans in a text, with characters counted in the caller's own string, or in pre-split words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import eq
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from mtserve.errors import InputError, Problem
from mtserve.rows import Floats, Row
from mtserve.tasks.aggregation import SpanScore, by_word, in_words, span_scores, token_scores, trimmed
from mtserve.tasks.base import (
    IGNORED,
    PLAIN,
    TEMPERATURE,
    Example,
    HeadSpec,
    Kind,
    LossTerms,
    Options,
    Parameters,
)
from mtserve.tasks.measures import LabelScores, Metrics, Outcomes, f_scores, label_report
from mtserve.tasks.scores import softmax
from mtserve.tasks.spans import (
    Span,
    invalid_tags,
    joined_words,
    spans_to_tags,
    tag_names,
    tags_to_spans,
    token_words,
    word_spans,
)
from mtserve.tasks.token_loss import token_divergence, token_loss
from mtserve.tasks.work import Work
from mtserve.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from mtserve.tasks.calibration import Calibration


class TokenClassificationOptions(Options):
    labels: tuple[str, ...] = Field(min_length=1, description="Span labels; the head's outputs are O, B-x and I-x.")
    temperature: float = TEMPERATURE

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError(f"labels must be distinct; found {', '.join(labels)}")
        return labels


class TokenClassificationParameters(Parameters):
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = Field(
        default="first",
        description="From token scores to spans: none (tokens), simple (tokens joined), or by words with the scores "
        "of the first token, the mean of all, or the surest one.",
    )
    ignore_labels: tuple[str, ...] = Field(default=(), description="Span labels to leave out.")


class TokenClassificationExample(Example):
    text: str | None = None
    words: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> TokenClassificationExample:
        if (self.text is None) == (self.words is None):
            raise ValueError("give either text or words")
        if self.words is not None and not all(word.strip() for word in self.words):
            raise ValueError("words must not be empty")
        return self

    @property
    def joined(self) -> str:
        """The text that is encoded: the caller's own, or the words with spaces between."""
        return self.text if self.text is not None else " ".join(self.words or ())


class GoldSpan(Example):
    start: int = Field(ge=0)
    end: int
    label: str


class LabelledTokenClassification(TokenClassificationExample):
    spans: tuple[GoldSpan, ...] | None = None
    tags: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _truth_fits(self) -> LabelledTokenClassification:
        if self.words is not None and (self.tags is None or len(self.tags) != len(self.words)):
            raise ValueError(f"{len(self.words)} words need as many tags; found {len(self.tags or ())}")
        if self.text is not None:
            if self.spans is None:
                raise ValueError("a text needs spans")
            for span in self.spans:
                if not span.start < span.end <= len(self.text):
                    raise ValueError(f"span [{span.start}, {span.end}) is not in a text of {len(self.text)} characters")
        broken = next(invalid_tags(self.tags or ()), None)
        if broken is not None and self.tags is not None:
            raise ValueError(f"tag {self.tags[broken]!r} at word {broken} breaks IOB2")
        return self


class TokenClassification(
    Kind[
        TokenClassificationOptions,
        TokenClassificationParameters,
        TokenClassificationExample,
        LabelledTokenClassification,
    ]
):
    name = "token_classification"
    options = TokenClassificationOptions
    parameters = TokenClassificationParameters
    example = TokenClassificationExample
    labelled = LabelledTokenClassification
    prediction = list[SpanScore]
    metric = "f1"
    label_field = "entity_group"
    loss_terms = frozenset({"label_smoothing", "class_weights", "r_drop"})

    def rows(self, example: TokenClassificationExample, options: TokenClassificationOptions, text: Text) -> list[Row]:
        return text.rows(example.joined, limits=options.limits)

    def texts(self, example: TokenClassificationExample) -> tuple[str, ...]:
        return (example.joined,)

    def head(self, options: TokenClassificationOptions) -> HeadSpec:
        return HeadSpec(architecture="token_classification", labels=tag_names(options.labels), reads="all")

    def fit(self, examples: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
        fitted = dict(options)
        if "labels" not in fitted:
            in_spans = {span["label"] for record in examples for span in record.get("spans") or ()}
            in_tags = {tag[2:] for record in examples for tag in record.get("tags") or () if tag != "O"}
            fitted["labels"] = sorted(in_spans | in_tags)
        return fitted

    def classes(self, options: TokenClassificationOptions) -> Mapping[str, tuple[str, ...]]:
        return {"spans": options.labels, "tags": tag_names(options.labels)}

    def target(
        self, example: LabelledTokenClassification, rows: Sequence[Row], options: TokenClassificationOptions
    ) -> list[Any]:
        """(len,) a row: the tag of each word at its first token; other tokens, and those that stand with more context
        in a neighbouring window, count in no loss."""
        targets = [np.full(len(row), IGNORED, np.int64) for row in rows]
        for number, at, tag in _firsts(example, rows, options):
            targets[number][at] = tag
        return targets

    def loss(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: TokenClassificationOptions,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Cross entropy, mean over words; 0 for a batch without a single labelled word. Class weights are of tags."""
        return token_loss(logits, [target for of_example in targets for target in of_example], terms)

    def disagreement(
        self,
        logits: Tensor,
        other: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: TokenClassificationOptions,
    ) -> Tensor:
        return token_divergence(logits, other, [target for of_example in targets for target in of_example])

    def decode(self, work: Work, options: TokenClassificationOptions, text: Text) -> list[SpanScore]:
        example, parameters = work.example, work.parameters
        assert isinstance(example, TokenClassificationExample)
        assert isinstance(parameters, TokenClassificationParameters)
        words, source = _words(example), example.joined
        placed = list(_tokens(source, work.prompt, words))
        if not placed:
            return []
        logits: Floats = np.stack([work.logits[number][at] for number, at, _ in placed])
        scores = softmax(np.divide(logits, options.temperature, dtype=np.float32))  # (tokens, n_out)
        offsets = [trimmed(source, *work.prompt[number].offsets[at].tolist()) for number, at, _ in placed]
        names = tag_names(options.labels)
        strategy = parameters.aggregation_strategy
        if strategy == "none":
            found = token_scores(source, scores, offsets, names)
        else:
            if strategy != "simple":
                owners = [word for _, _, word in placed]
                scores, offsets = by_word(scores, owners, words, strategy)
            found = span_scores(source, scores, offsets, names)
        kept = [f for f in found if (f.get("entity_group") or f["entity"][2:]) not in parameters.ignore_labels]
        return kept if example.words is None else [in_words(f, words) for f in kept]

    def calibrate(
        self,
        works: Sequence[Work],
        predictions: Sequence[list[SpanScore]],
        examples: Sequence[LabelledTokenClassification],
        options: TokenClassificationOptions,
    ) -> Calibration:
        """Of the tags of words at their first tokens, most of which are O."""
        from mtserve.tasks.calibration import by_class

        both = list(zip(works, examples, strict=True))
        found = [(work.logits[n][at], tag) for work, one in both for n, at, tag in _firsts(one, work.prompt, options)]
        width = len(tag_names(options.labels))
        logits = np.array([one for one, _ in found], np.float32).reshape(len(found), width)
        return by_class(softmax(logits), np.array([tag for _, tag in found], np.int64))

    def outcomes(
        self,
        predictions: Sequence[list[SpanScore]],
        examples: Sequence[LabelledTokenClassification],
        options: TokenClassificationOptions,
    ) -> Outcomes:
        """(examples, labels, 3) spans: found rightly, found, true; (examples, 2) words: tagged rightly, all."""
        counts = np.zeros((len(examples), len(options.labels), 3), np.int64)
        tagged = np.zeros((len(examples), 2), np.int64)
        for at, (prediction, example) in enumerate(zip(predictions, examples, strict=True)):
            true = set(_gold(example))
            guess = {(p["start"], p["end"], p["entity_group"]) for p in prediction}
            for which, spans in enumerate((true & guess, guess, true)):
                for _, _, label in spans:
                    counts[at, options.labels.index(label), which] += 1
            words = _words(example) if example.words is None else [(n, n + 1) for n in range(len(example.words))]
            tags = [spans_to_tags(words, sorted(spans)) for spans in (true, guess)]
            tagged[at] = sum(map(eq, *tags)), len(words)
        return counts, tagged

    def score(self, outcomes: Outcomes, options: TokenClassificationOptions) -> Metrics:
        """Precision, recall and F1 over the spans of all labels together: both limits and the label must be right, and
        an I- that continues nothing is no span (CoNLL-2003; seqeval's strict IOB2). Accuracy is that of the words'
        tags, most of which are O: read it beside its baseline."""
        precision, recall, f1, _ = f_scores(outcomes[0].sum((0, 1)))
        right, words = outcomes[1].sum(0)
        accuracy = float(right / max(words, 1))
        return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "accuracy": accuracy}

    def report(self, outcomes: Outcomes, options: TokenClassificationOptions) -> dict[str, LabelScores]:
        return label_report(options.labels, f_scores(outcomes[0].sum(0)))

    def baseline(
        self, examples: Sequence[LabelledTokenClassification], options: TokenClassificationOptions
    ) -> list[SpanScore]:
        return []  # O is the majority tag

    def truths(self, example: LabelledTokenClassification, options: TokenClassificationOptions) -> list[str]:
        return [label for _, _, label in _gold(example)]

    def flat_types(self, options: TokenClassificationOptions) -> Mapping[str, Any]:
        return {"spans": self.prediction}

    def flat(self, prediction: list[SpanScore], options: TokenClassificationOptions) -> Mapping[str, Any]:
        return {"spans": prediction}

    def sample(self, options: TokenClassificationOptions) -> TokenClassificationExample:
        return TokenClassificationExample(text="Ana Silva moved from Porto to Oslo in May.")

    def label_names(self, options: TokenClassificationOptions) -> tuple[str, ...]:
        return options.labels


def _words(example: TokenClassificationExample) -> list[tuple[int, int]]:
    return word_spans(example.joined) if example.words is None else joined_words(example.words)[1]


def _gold(example: LabelledTokenClassification) -> list[Span]:
    """True spans, in the unit in which predictions of this example count."""
    if example.tags is not None and example.words is not None:
        return tags_to_spans(example.tags)
    return [(span.start, span.end, span.label) for span in example.spans or ()]


def _firsts(
    example: LabelledTokenClassification, rows: Sequence[Row], options: TokenClassificationOptions
) -> list[tuple[int, int, int]]:
    """(row, position in the row, true tag) of the first token of every word. Raises InputError for an unknown tag."""
    words = _words(example)
    tags = list(example.tags) if example.tags is not None else spans_to_tags(words, _gold(example))
    names = tag_names(options.labels)
    unknown = [tag for tag in tags if tag not in names]
    if unknown:
        raise InputError(Problem(f"{unknown[0]!r} is not among {', '.join(names)}", field="tags"))
    found: dict[int, tuple[int, int, int]] = {}
    for number, at, word in _tokens(example.joined, rows, words):
        if word >= 0:
            found.setdefault(word, (number, at, names.index(tags[word])))
    return list(found.values())


def _tokens(source: str, rows: Sequence[Row], words: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(row, position in the row, word or -1) of every token of the text, each once: of the windows that hold a token
    the one where it stands farthest from an end of the text that this window sees."""
    best: dict[int, tuple[int, int, int, int]] = {}
    for number, row in enumerate(rows):
        own = np.flatnonzero(~row.special)
        owners = token_words(source, row.offsets, words)
        for place, at in enumerate(own.tolist()):
            context = min(place, len(own) - 1 - place)
            known = best.get(row.first + place)
            if known is None or context > known[0]:
                best[row.first + place] = (context, number, at, int(owners[at]))
    return [best[token][1:] for token in sorted(best)]
