"""Generation on a causal trunk: a prompt made by a template, and an answer token by token.

The template names the caller's text, the answer and the special tokens around them: `{source}<bos>{target}<eos>`. What
stands before `{target}` is the prompt, the one token after it ends the answer; where nothing stands there, the
tokenizer's own end token does. How tokens are chosen is in `decoding`; what a backend keeps of a sequence between steps
is the row's past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NotRequired

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import TypedDict

from mtserve.errors import ConfigError, InputError, Problem
from mtserve.rows import Past, Row
from mtserve.tasks.base import IGNORED, PLAIN, Example, HeadSpec, Kind, LossTerms, Options
from mtserve.tasks.decoding import Decoding, GenerationParameters, Reader, Search, make_search
from mtserve.tasks.measures import Metrics, Outcomes
from mtserve.tasks.overlap import overlap_outcomes, overlap_score
from mtserve.tasks.token_loss import token_divergence, token_loss
from mtserve.tasks.work import Work
from mtserve.text import Text

if TYPE_CHECKING:
    from torch import Tensor

SOURCE, TARGET = "{source}", "{target}"


class GenerationOptions(Options):
    template: str = Field(
        default="{source}\n{target}",
        description="Prompt and answer: {source} is the caller's text, {target} the answer, special tokens elsewhere "
        "in it are tokens; at most one token stands after {target}, the one that ends an answer.",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Most tokens of an answer, its end token included.")
    generation: GenerationParameters = Field(
        default=GenerationParameters(), description="How answers are made where a request does not say otherwise."
    )
    type_id: int = Field(default=0, ge=0, description="Segment id of every token; 0 stands for none.")

    @model_validator(mode="after")
    def _usable(self) -> GenerationOptions:
        if self.template.count(SOURCE) != 1 or self.template.count(TARGET) != 1:
            raise ValueError(f"template must contain {SOURCE} and {TARGET} once each; found {self.template!r}")
        if self.template.index(TARGET) < self.template.index(SOURCE):
            raise ValueError(f"template must have {SOURCE} before {TARGET}; found {self.template!r}")
        if self.on_long == "window":
            raise ValueError("on_long window is not possible for generation; allowed: truncate, error")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be less than max_length {self.max_length}")
        try:
            GenerationParameters().resolve(self.generation, limit=self.max_new_tokens)
        except InputError as error:
            raise ValueError(f"generation: {error}") from error
        if self.append:
            raise ValueError("append is not possible for generation; allowed: special tokens in the template")
        return self

    @property
    def parts(self) -> tuple[str, str, str]:
        """The template's literals: before the source, between source and answer, after the answer."""
        before, rest = self.template.split(SOURCE)
        between, after = rest.split(TARGET)
        return before, between, after


class GenerationExample(Example):
    text: str


class LabelledGeneration(GenerationExample):
    target: str


class GeneratedText(TypedDict):
    """One answer; `translation_text` is the same text under the name that translation clients read.

    finish_reason   `eos_token`, `length` or `stop_sequence`
    score           the sequence's log-probability (of beams: as their length penalty weighs it); of one answer only
                    where the request asks for it
    details         as text-generation-inference has them, where the request asks for them
    """

    generated_text: str
    translation_text: str
    finish_reason: str
    score: NotRequired[float]
    details: NotRequired[dict[str, Any]]


@dataclass
class Running:
    """What a generation knows between steps."""

    decoding: Decoding
    search: Search
    reader: Reader
    sent: int = 0  # tokens that were read along, an end token among them

    def fresh(self) -> list[dict[str, Any]]:
        """The tokens that were not read yet, as text-generation-inference says them. An end token has no text but what
        was held back."""
        search, over = self.search, self.search.finish_reason
        tokens = search.tokens[self.sent :]
        pieces = self.reader.feed(tokens)
        if over == "eos_token" and search.end is not None and self.sent <= len(search.tokens):
            tokens, pieces = (*tokens, search.end), [*pieces, ""]
        if over is not None and pieces:
            pieces[-1] += self.reader.flush()
        said = []
        for token, piece in zip(tokens, pieces, strict=True):
            special = self.sent == len(search.tokens) and not piece
            said.append({"id": token, "text": piece, "logprob": search.logprobs[self.sent], "special": special})
            self.sent += 1
        return said

    @property
    def ended(self) -> dict[str, Any]:
        """Why the answer ended, how long it is, and what repeats it."""
        reason = self.search.finish_reason
        return {"finish_reason": reason, "generated_tokens": self.sent, "seed": self.decoding.seed}


class Generation(Kind[GenerationOptions, GenerationParameters, GenerationExample, LabelledGeneration]):
    name = "generation"
    options = GenerationOptions
    parameters = GenerationParameters
    example = GenerationExample
    labelled = LabelledGeneration
    prediction = list[GeneratedText]
    metric = "bleu"
    causal = True
    streams = True
    loss_terms = frozenset({"label_smoothing", "r_drop"})

    def rows(self, example: GenerationExample, options: GenerationOptions, text: Text) -> list[Row]:
        return [self._prompt(example.text, options, text, answer=options.max_new_tokens)]

    @staticmethod
    def _prompt(source: str, options: GenerationOptions, text: Text, *, answer: int) -> Row:
        """The prompt with room for `answer` tokens after it."""
        before, between, _ = options.parts
        limit, steps = options.max_length, options.preparation
        row = text.prompt(before, source, between, max_length=limit, reserved=answer, preparation=steps)
        if not row.own_tokens:
            raise InputError(Problem("has no tokens", field="text"))
        if row.cut and options.on_long == "error":
            raise InputError(f"the text is {row.cut} tokens too long (max_length {options.max_length})")
        if options.type_id:
            row = replace(row, type_ids=np.full(len(row), options.type_id, np.int32))
        return row

    @staticmethod
    def _end(options: GenerationOptions, text: Text) -> int | None:
        """The token that ends an answer. Raises ConfigError for a template that ends in several."""
        after = options.parts[2]
        if not after:
            return text.spec.eos_id
        ids = text.literal(after)
        if len(ids) != 1:
            found = f"{after!r} after {TARGET} is {len(ids)} tokens of this tokenizer"
            raise ConfigError(f"template: {found}; allowed: one that ends an answer, or nothing")
        return ids[0]

    def features(self, example: LabelledGeneration, options: GenerationOptions, text: Text) -> tuple[list[Row], Any]:
        """Prompt, target and end token as one row; only target and end count in the loss. The source is cut first."""
        answer, end = text.plain(example.target), self._end(options, text)
        if not answer:
            raise InputError(Problem("has no tokens", field="target"))
        if end is not None:
            answer.append(end)
        prompt = self._prompt(example.text, options, text, answer=len(answer))
        row = prompt.extended(answer)
        target = np.full(len(row), IGNORED, np.int64)  # (len,) the token after each position, where it is the answer's
        target[len(prompt) - 1 : -1] = row.ids[len(prompt) :]
        return [row], target

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

    def disagreement(
        self,
        logits: Tensor,
        other: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: GenerationOptions,
    ) -> Tensor:
        return token_divergence(logits, other, targets)

    def check_text(self, options: GenerationOptions, text: Text) -> None:
        self._end(options, text)
        if options.type_id >= text.vocab_size:
            raise ConfigError(f"type_id: {options.type_id} is no token's id; allowed: below {text.vocab_size}")

    def begin(self, work: Work, options: GenerationOptions, text: Text) -> None:
        assert isinstance(work.parameters, GenerationParameters)
        decoding = work.parameters.resolve(options.generation, limit=options.max_new_tokens)
        (row,) = work.rows
        end, told = self._end(options, text), work.streamed or decoding.details
        search = make_search(decoding, prompt=row.ids, end=end, decode=text.decode, logprobs=told)
        work.state = Running(decoding, search, Reader(text.decode, decoding.stop_strings))
        work.reserved, work.sequences = len(row) + decoding.max_new_tokens, decoding.sequences
        work.rows = [replace(row, past=Past())]

    def advance(self, work: Work, options: GenerationOptions, text: Text) -> bool:
        moves = work.state.search.advance(work.logits)
        taken: set[int] = set()
        rows = []
        for move in moves:
            row = work.rows[move.parent]
            longer = row.first_tokens(len(row) - row.answers + 1).extended([*move.tokens, *move.guesses])
            past = row.past
            if past is not None and move.parent in taken:
                past = past.fork()
            taken.add(move.parent)
            rows.append(replace(longer, past=past, answers=1 + len(move.guesses)))
        for row in rows:
            if row.past is not None:  # rejected guesses are forgotten
                row.past.cut(len(row) - row.answers)
        work.rows = rows
        return not moves

    def emit(self, work: Work, options: GenerationOptions, text: Text) -> list[Any]:
        """Events of text-generation-inference, one a token; the last one has the whole answer too."""
        running: Running = work.state
        first, nothing = running.sent + 1, {"generated_text": None, "details": None}
        events: list[dict[str, Any]] = [
            {"index": index, "token": token, **nothing} for index, token in enumerate(running.fresh(), first)
        ]
        if events and running.search.finish_reason is not None:
            events[-1] |= {"generated_text": running.search.answers[0].text, "details": running.ended}
        return events

    def decode(self, work: Work, options: GenerationOptions, text: Text) -> list[GeneratedText]:
        running: Running = work.state
        answers = running.search.answers
        shown = len(answers) > 1 or running.decoding.output_scores
        made = [_generated(a.text, a.finish_reason, a.score if shown else None) for a in answers]
        if running.decoding.details:
            running.sent, running.reader = 0, Reader(text.decode, running.decoding.stop_strings)
            tokens = running.fresh()
            made[0]["details"] = {**running.ended, "prefill": [], "tokens": tokens}
        return made

    def check(self, example: GenerationExample, options: GenerationOptions, parameters: GenerationParameters) -> None:
        parameters.resolve(options.generation, limit=options.max_new_tokens)

    def check_stream(self, options: GenerationOptions, parameters: GenerationParameters) -> None:
        if parameters.resolve(options.generation, limit=options.max_new_tokens).sequences > 1:
            raise InputError(Problem("several sequences or beams cannot be read along", field="stream"))

    def outcomes(
        self,
        predictions: Sequence[list[GeneratedText]],
        examples: Sequence[LabelledGeneration],
        options: GenerationOptions,
    ) -> Outcomes:
        made = [prediction[0]["generated_text"] for prediction in predictions]
        return overlap_outcomes(made, [e.text for e in examples], [e.target for e in examples])

    def score(self, outcomes: Outcomes, options: GenerationOptions) -> Metrics:
        return overlap_score(outcomes)

    def baseline(self, examples: Sequence[LabelledGeneration], options: GenerationOptions) -> list[GeneratedText]:
        return [_generated("", "eos_token")]

    def copied(self, example: LabelledGeneration, options: GenerationOptions) -> list[GeneratedText]:
        return [_generated(example.text, "eos_token")]

    def flat_types(self, options: GenerationOptions) -> Mapping[str, Any]:
        """The best answer."""
        return {"text": str}

    def flat(self, prediction: list[GeneratedText], options: GenerationOptions) -> Mapping[str, Any]:
        return {"text": prediction[0]["generated_text"]}

    def sample(self, options: GenerationOptions) -> GenerationExample:
        return GenerationExample(text="I do not know where he has gone.")


def _generated(text: str, reason: str, score: float | None = None) -> GeneratedText:
    made = GeneratedText(generated_text=text, translation_text=text, finish_reason=reason)
    return made if score is None else {**made, "score": score}
