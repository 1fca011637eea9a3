"""What a request may say about decoding, and the values that are in force. Knows no logits.

Names and meanings are those of Transformers' `GenerationConfig`, but for `seed`, which that has not, and `top_k`, which
here limits nothing unless it is given (there it is 50). Clients of text-generation-inference send some names of that
server: `details` and, for `stop_strings`, `stop`; others count as not given while they ask for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from mtserve.errors import InputError, Problem
from mtserve.tasks.base import Parameters

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
_BEAMS = ("length_penalty", "early_stopping")
_ELSEWHERE = frozenset({"adapter_id", "best_of", "decoder_input_details", "frequency_penalty", "grammar"})
_ELSEWHERE |= {"return_full_text", "top_n_tokens", "truncate", "typical_p", "watermark"}
_StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]


@dataclass(frozen=True)
class Decoding:
    """The values in force for one generation; those that do not apply (a temperature without sampling) are unused."""

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()
    prompt_lookup_num_tokens: int | None = None
    output_scores: bool = False
    details: bool = False
    seed: int | None = None

    @property
    def sequences(self) -> int:
        """How many sequences live at once."""
        return max(self.num_beams, self.num_return_sequences)


class GenerationParameters(Parameters):
    """Decoding as a request, or a task for its requests, wishes it; what is None is left to the next in line."""

    model_config = ConfigDict(allow_inf_nan=False)

    max_new_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer, its end token included.")
    min_new_tokens: int | None = Field(None, ge=0, description="No end token before so many tokens.")
    do_sample: bool | None = Field(None, description="Draw tokens at random instead of taking the likeliest.")
    temperature: float | None = Field(None, ge=0.01, le=10, description="Sampling: below 1, likely tokens gain.")
    top_k: int | None = Field(None, ge=1, description="Sampling: only among so many likeliest tokens.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sampling: only among the likeliest tokens that have this probability together."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Sampling: only tokens with this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="Above 1, tokens of the prompt and of the answer so far become less likely."
    )
    no_repeat_ngram_size: int | None = Field(
        None, ge=1, description="No sequence of so many tokens occurs twice, the prompt included."
    )
    num_beams: int | None = Field(None, ge=1, le=16, description="Beam search with so many beams.")
    length_penalty: float | None = Field(
        None, ge=-10, le=10, description="Beams: scores are divided by the answer's length to this power."
    )
    early_stopping: bool | None = Field(None, description="Beams: stop when there are as many answers as beams.")
    num_return_sequences: int | None = Field(None, ge=1, le=16, description="So many answers, best first.")
    stop_strings: tuple[_StopString, ...] | None = Field(
        None, min_length=1, max_length=8, description="The answer ends before the first of these texts (also: stop)."
    )
    prompt_lookup_num_tokens: int | None = Field(
        None, ge=1, le=32, description="Greedy: guess so many tokens from the text so far; same answer, fewer passes."
    )
    output_scores: bool | None = Field(None, description="Say the score of each answer, its log-probability.")
    details: bool | None = Field(None, description="Say the tokens of a single answer and their log-probabilities.")
    seed: int | None = Field(None, ge=0, lt=2**32, description="Sampling: the same seed repeats the same draws.")

    @model_validator(mode="before")
    @classmethod
    def _of_clients(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        given = {name: value for name, value in raw.items() if name not in _ELSEWHERE or value not in (None, False)}
        if "stop_strings" not in given and "stop" in given:
            given["stop_strings"] = given.pop("stop") or None
        return given

    def resolve(self, defaults: GenerationParameters, *, limit: int) -> Decoding:
        """These values over a task's defaults, of which those that do not go with them are unused.

        limit: the task's most tokens of an answer. Raises InputError that names every value that cannot be had.
        """
        asked = self.model_dump(exclude_none=True)
        values = {"max_new_tokens": limit, **defaults.model_dump(exclude_none=True), **asked}
        if "num_beams" not in asked and self.do_sample:
            values["num_beams"] = 1
        if "do_sample" not in asked and asked.get("num_beams", 1) > 1:
            values["do_sample"] = False
        if self.max_new_tokens is None:
            values["max_new_tokens"] = min(values["max_new_tokens"], limit)
        if "num_return_sequences" not in asked and not values.get("do_sample"):
            values["num_return_sequences"] = min(values.get("num_return_sequences", 1), values.get("num_beams", 1))
        found = Decoding(**values)
        problems = [Problem(text, field=f"parameters.{name}") for name, text in _conflicts(asked, found, limit)]
        if problems:
            raise InputError(problems)
        lookup = None if found.do_sample or found.sequences > 1 else found.prompt_lookup_num_tokens
        least, details = min(found.min_new_tokens, found.max_new_tokens), found.details and found.sequences == 1
        return replace(found, min_new_tokens=least, prompt_lookup_num_tokens=lookup, details=details)


def _conflicts(asked: dict[str, Any], found: Decoding, limit: int) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of every value in `asked` that does not go with the others."""
    if found.max_new_tokens > limit:
        yield "max_new_tokens", f"{found.max_new_tokens} is over this task's limit of {limit}"
    if "min_new_tokens" in asked and found.min_new_tokens > found.max_new_tokens:
        yield "min_new_tokens", f"{found.min_new_tokens} is over max_new_tokens, which is {found.max_new_tokens}"
    for name in () if found.do_sample else _SAMPLING:
        if name in asked:
            yield name, "has no effect without sampling; set do_sample to true, or leave it out"
    if found.do_sample and found.num_beams > 1:
        yield "num_beams", f"{found.num_beams} beams with do_sample are not supported; choose one of the two"
    for name in _BEAMS if found.num_beams == 1 else ():
        if name in asked:
            yield name, "has no effect without beams; set num_beams to 2 or more, or leave it out"
    answers = found.num_return_sequences
    if "num_return_sequences" in asked and not found.do_sample and answers > found.num_beams:
        yield (
            "num_return_sequences",
            (f"{answers} answers need do_sample, or num_beams of at least {answers} (it is {found.num_beams})"),
        )
    if asked.get("details") and found.sequences > 1:
        yield "details", f"are of a single answer; {found.sequences} sequences are asked for"
    if "prompt_lookup_num_tokens" in asked and (found.do_sample or found.sequences > 1):
        yield "prompt_lookup_num_tokens", "is for one greedy answer: without do_sample, num_beams, num_return_sequences"
