"""Generation on a causal trunk, in its first form: greedy, each step one more token for every row of the batch.

A step encodes the whole row again, so a generation is a row like any other and shares its passes with every task; the
kind with a key-value cache, sampling and streaming replaces `advance`, not the contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import TypedDict

from mtserve.errors import InputError, Problem
from mtserve.rows import Row
from mtserve.tasks.base import IGNORED, PLAIN, Example, HeadSpec, Kind, LossTerms, Options, Parameters, Work
from mtserve.tasks.measures import Metrics, Outcomes
from mtserve.tasks.token_loss import token_loss
from mtserve.text import Text

if TYPE_CHECKING:
    from torch import Tensor

PLACE = "{text}"


class GenerationOptions(Options):
    template: str = Field(
        default="{text}\n", description="The prompt: {text} is the caller's text; special tokens elsewhere are tokens."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Most tokens of an answer, its end token included.")

    @model_validator(mode="after")
    def _usable(self) -> GenerationOptions:
        if self.template.count(PLACE) != 1:
            raise ValueError(f"template must contain {PLACE} once; found {self.template!r}")
        if self.on_long == "window":
            raise ValueError("on_long window is not possible for generation; allowed: truncate, error")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be less than max_length {self.max_length}")
        return self


class GenerationParameters(Parameters):
    max_new_tokens: int | None = Field(default=None, ge=1, description="Most tokens to make; the task's limit holds.")


class GenerationExample(Example):
    text: str


class LabelledGeneration(GenerationExample):
    target: str


class GeneratedText(TypedDict):
    generated_text: str
    translation_text: str


class Generation(Kind[GenerationOptions, GenerationParameters, GenerationExample, LabelledGeneration]):
    name = "generation"
    options = GenerationOptions
    parameters = GenerationParameters
    example = GenerationExample
    labelled = LabelledGeneration
    prediction = list[GeneratedText]
    metric = "exact_match"
    causal = True
    loss_terms = frozenset({"label_smoothing"})

    def rows(self, example: GenerationExample, options: GenerationOptions, text: Text) -> list[Row]:
        return [self._prompt(example.text, options, text, answer=options.max_new_tokens)]

    @staticmethod
    def _prompt(source: str, options: GenerationOptions, text: Text, *, answer: int) -> Row:
        """The prompt with room for `answer` tokens after it."""
        before, after = options.template.split(PLACE)
        limit = options.max_length - answer
        row = text.prompt(before, source, after, max_length=limit, preparation=options.preparation)
        if row.cut and options.on_long == "error":
            raise InputError(f"the text is {row.cut} tokens too long (max_length {options.max_length})")
        return row

    def features(self, example: LabelledGeneration, options: GenerationOptions, text: Text) -> tuple[list[Row], Any]:
        """Prompt, target and end token as one row; only target and end count in the loss. The source is cut first."""
        answer = text.plain(example.target)
        if text.spec.eos_id is not None:
            answer.append(text.spec.eos_id)
        if not answer:
            raise InputError(Problem("has no tokens", field="target"))
        prompt = row = self._prompt(example.text, options, text, answer=len(answer))
        for token in answer:
            row = row.extended(token)
        return [row], self._shifted(len(prompt), row)

    @staticmethod
    def _shifted(prompt: int, row: Row) -> Any:
        """(len,) the token after each position where it belongs to the answer."""
        target = np.full(len(row), IGNORED, np.int64)
        target[prompt - 1 : -1] = row.ids[prompt:]
        return target

    def head(self, options: GenerationOptions) -> HeadSpec:
        return HeadSpec(architecture="causal_lm", reads="last")

    def target(self, example: LabelledGeneration, rows: Sequence[Row], options: GenerationOptions) -> Any:
        raise TypeError("the target of a generation is part of its rows: call features()")

    def loss(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: GenerationOptions,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        return token_loss(logits, targets, terms)

    def advance(self, work: Work, options: GenerationOptions, text: Text) -> bool:
        assert isinstance(work.parameters, GenerationParameters)
        token = int(np.argmax(work.logits[0]))
        if token == text.spec.eos_id:
            return True
        work.generated.append(token)
        work.rows = [work.rows[0].extended(token)]
        return len(work.generated) >= (work.parameters.max_new_tokens or options.max_new_tokens)

    def decode(self, work: Work, options: GenerationOptions, text: Text) -> list[GeneratedText]:
        made = text.decode(work.generated)
        return [GeneratedText(generated_text=made, translation_text=made)]

    def check(self, example: GenerationExample, options: GenerationOptions, parameters: GenerationParameters) -> None:
        asked = parameters.max_new_tokens
        if asked is not None and asked > options.max_new_tokens:
            found = f"{asked} is over this task's limit of {options.max_new_tokens}"
            raise InputError(Problem(found, field="parameters.max_new_tokens"))

    def outcomes(
        self,
        predictions: Sequence[list[GeneratedText]],
        examples: Sequence[LabelledGeneration],
        options: GenerationOptions,
    ) -> Outcomes:
        """(examples,) whether the text is the wanted one, but for spaces around it."""
        pairs = zip(predictions, examples, strict=True)
        return (np.array([p[0]["generated_text"].strip() == e.target.strip() for p, e in pairs]),)

    def score(self, outcomes: Outcomes, options: GenerationOptions) -> Metrics:
        return {"exact_match": float(outcomes[0].mean())}

    def baseline(self, examples: Sequence[LabelledGeneration], options: GenerationOptions) -> list[GeneratedText]:
        return [GeneratedText(generated_text="", translation_text="")]

    def copied(self, example: LabelledGeneration, options: GenerationOptions) -> list[GeneratedText]:
        return [GeneratedText(generated_text=example.text, translation_text=example.text)]

    def sample(self, options: GenerationOptions) -> GenerationExample:
        return GenerationExample(text="I do not know where he has gone.")
