"""Chains: answers of one task that become inputs of another one. Pure; knows no engine, no HTTP and no file.

    example --first--> prediction --items--> inputs --then--> answers --joined--> prediction of the chain

A link says what is handed on: `spans`, each with its text, or the candidates of a generation, to be ranked (`rerank`).
Both tasks stay what they are, with their own parameters, golden rows and metrics. A server, `Engine.score` and files
ask the same functions in the same order, so their answers are the same.

Invariants (tests/test_chains.py holds them):
1. Of a prediction, `spans` hands on every span of the labels that are followed, once, in order, and `joined` gives
   these spans as they were, each with its answer under `then`.
2. What `rerank` gives is a permutation of the first task's candidates, best first by the score of the chain's label;
   among equal scores the first task's order stays. A candidate without text is not asked about and comes last.
3. A chain that passes `check` makes only inputs that the second task's kind reads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from mtserve.errors import InputError, Problem
from mtserve.tasks import KINDS
from mtserve.tasks.aggregation import SpanScore
from mtserve.tasks.base import AnyKind, Example, Options
from mtserve.tasks.classification import ClassificationOptions, ClassificationParameters, LabelScore
from mtserve.tasks.decoding import GenerationParameters
from mtserve.tasks.generation import GeneratedText, GenerationOptions
from mtserve.tasks.token_classification import (
    TokenClassificationExample,
    TokenClassificationOptions,
    TokenClassificationParameters,
)
from mtserve.tasks.validation import json_type, validate

T = TypeVar("T")
TextField = Literal["text", "text_pair"]
Values = Mapping[str, Any]


class Known(Protocol):
    """A task, as far as a chain asks about it."""

    @property
    def kind(self) -> AnyKind: ...

    @property
    def options(self) -> Options: ...


class Member(NamedTuple):
    """A task by its kind and options alone."""

    kind: AnyKind
    options: Options


Tasks = Mapping[str, Known]


class Steps(NamedTuple):
    """Parameters of both steps of a request."""

    first: Values
    then: Values


class FollowedSpan(TypedDict):
    """A span as the first task found it, and what the second one says of it."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int
    then: list[LabelScore]


class RankedText(GeneratedText):
    """A candidate as the first task made it; `then` has the chain's label with its score, nothing where the candidate
    has no text."""

    then: list[LabelScore]


class Chain(BaseModel):
    """Two tasks of one checkpoint, by name.

    kinds        of the two tasks
    prediction   type of the answer to one input, JSON-ready
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kinds: ClassVar[tuple[str, str]]
    prediction: ClassVar[Any]

    name: str
    first: str
    then: str

    def check(self, tasks: Tasks) -> None:
        """Raise ValueError if these two tasks cannot be linked so."""
        for role, wanted in zip(("first", "then"), self.kinds, strict=True):
            name = getattr(self, role)
            if name not in tasks:
                raise ValueError(f"chain {self.name!r}: no task {name!r}; allowed: {', '.join(tasks) or 'none'}")
            if (found := tasks[name].kind.name) != wanted:
                raise ValueError(f"chain {self.name!r}: {role} {name!r} is a {found}; allowed: a {wanted}")
        try:
            self._check(tasks[self.first].options, tasks[self.then].options)
            self.steps({}, tasks)
        except (InputError, ValueError) as error:
            raise ValueError(f"chain {self.name!r}: {error}") from error

    def steps(self, given: Values | None, tasks: Tasks) -> Steps:
        """Parameters of both steps, of those that a request gives by task. Raises InputError that names every wrong
        one."""
        given, names = given or {}, (self.first, self.then)
        allowed = f"not allowed here; allowed: {', '.join(names)}"
        problems = [Problem(allowed, field=f"parameters.{name}") for name in given if name not in names]
        chosen = []
        for name in names:
            try:
                chosen.append(self._chosen(name, given.get(name), tasks[name]))
            except InputError as error:
                fields = [(p.message, (p.field or "").removeprefix("parameters")) for p in error.problems]
                problems += [Problem(message, field=f"parameters.{name}{field}") for message, field in fields]
        if problems:
            raise InputError(problems)
        return Steps(*chosen)

    def _chosen(self, name: str, given: Any, task: Known) -> Values:
        """Checked parameters of a step, as they are asked. Raises InputError with fields `parameters.…`."""
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise InputError(f"must be an object; found {json_type(given)}")
        parsed = validate(task.kind.parameters, given, prefix="parameters.")
        wanted = self._of_first(given, parsed, task.options) if name == self.first else self._of_then(given, parsed)
        made = validate(task.kind.parameters, wanted, prefix="parameters.")
        task.kind.check(task.kind.sample(task.options), task.options, made)
        return wanted

    def linked(self, names: Mapping[str, str], *, name: str | None = None) -> AnyChain:
        """The chain where tasks have other names, and under another one itself if it is given."""
        new = {"first": names.get(self.first, self.first), "then": names.get(self.then, self.then)}
        made: AnyChain = self.model_copy(update={**new, "name": name or self.name})  # type: ignore[assignment]
        return made

    @abstractmethod
    def _check(self, first: Any, then: Any) -> None:
        """Raise ValueError for options that the link does not go with."""

    def _of_first(self, given: Values, parsed: Any, options: Any) -> Values:
        """Parameters of the first step. Raises InputError for those that leave nothing to hand on."""
        return given

    def _of_then(self, given: Values, parsed: Any) -> Values:
        """Likewise of the second."""
        return given

    @abstractmethod
    def items(self, example: Example, prediction: Any) -> list[dict[str, str]]:
        """Inputs of the second task that the first one's answer to an example gives."""

    @abstractmethod
    def joined(self, prediction: Any, answers: Sequence[Any]) -> Any:
        """The chain's answer, of the first task's and of those to its `items`, in their order."""

    def flat_types(self, options: Any) -> Values:
        """Columns in which a table has the gist of an answer, and their types: those of the first task's kind."""
        kind = KINDS[self.kinds[0]]
        types = kind.flat_types(options).items()
        return {name: self.prediction if of == kind.prediction else of for name, of in types}

    def flat(self, prediction: Any, options: Any) -> Values:
        """An answer in those columns."""
        return KINDS[self.kinds[0]].flat(prediction, options)


class Spans(Chain):
    """Each span that the first task finds is an input of the second: the span in one field, its whole text in another.

    By default they stand as in the format `absa` of training: the text, and the span as the second of a pair.
    """

    kinds = ("token_classification", "classification")
    prediction = list[FollowedSpan]

    link: Literal["spans"] = "spans"
    labels: tuple[str, ...] | None = Field(default=None, min_length=1, description="Of spans that are followed; all.")
    span: TextField = Field(default="text_pair", description="The field that the span is put into.")
    text: TextField | None = Field(default="text", description="The field of the whole text; null for none.")

    @model_validator(mode="after")
    def _fields_fit(self) -> Spans:
        if self.span == self.text or "text" not in (self.span, self.text):
            raise ValueError(f"span in {self.span} and text in {self.text}; allowed: two fields, or the span in text")
        return self

    def _check(self, first: TokenClassificationOptions, then: ClassificationOptions) -> None:
        if unknown := [label for label in self.labels or () if label not in first.labels]:
            raise ValueError(f"{self.first!r} has no label {unknown[0]!r}; allowed: {', '.join(first.labels)}")

    def _of_first(self, given: Values, parsed: TokenClassificationParameters, options: Any) -> Values:
        if parsed.aggregation_strategy == "none":
            field = "parameters.aggregation_strategy"
            raise InputError(Problem("none gives tokens, which a chain does not follow", field=field))
        return given

    def _followed(self, prediction: Sequence[SpanScore]) -> list[SpanScore]:
        return [one for one in prediction if self.labels is None or one["entity_group"] in self.labels]

    def items(self, example: Example, prediction: Sequence[SpanScore]) -> list[dict[str, str]]:
        assert isinstance(example, TokenClassificationExample)
        whole: dict[str, str] = {} if self.text is None else {self.text: example.joined}
        return [{**whole, self.span: one["word"]} for one in self._followed(prediction)]

    def joined(self, prediction: Sequence[SpanScore], answers: Sequence[Any]) -> list[FollowedSpan]:
        both = zip(self._followed(prediction), answers, strict=True)
        return [cast("FollowedSpan", {**one, "then": answer}) for one, answer in both]


class Rerank(Chain):
    """Several answers of a generation, best first by the score that the second task gives the chain's label."""

    kinds = ("generation", "classification")
    prediction = list[RankedText]

    link: Literal["rerank"] = "rerank"
    label: str = Field(description="Of the second task: the one that candidates should have.")
    candidates: int = Field(default=4, ge=2, le=16, description="How many answers are ranked.")

    def _check(self, first: GenerationOptions, then: ClassificationOptions) -> None:
        if self.label not in then.labels:
            raise ValueError(f"{self.then!r} has no label {self.label!r}; allowed: {', '.join(then.labels)}")

    def _of_first(self, given: Values, parsed: GenerationParameters, options: GenerationOptions) -> Values:
        """As many candidates as the chain has: by beams, unless request or task wish to sample."""
        of_task, answers = options.generation, parsed.num_return_sequences or self.candidates
        sampled = of_task.do_sample if parsed.do_sample is None else parsed.do_sample
        found = {**given, "num_return_sequences": answers}
        if not sampled and parsed.num_beams is None:
            found["num_beams"] = max(answers, of_task.num_beams or 1)
        return found

    def _of_then(self, given: Values, parsed: ClassificationParameters) -> Values:
        left_out = [name for name in ("top_k", "threshold", "decided") if getattr(parsed, name)]
        said = "leaves out labels, and the chain needs the score of its own"
        if left_out:
            raise InputError([Problem(said, field=f"parameters.{name}") for name in left_out])
        return given

    def items(self, example: Example, prediction: Sequence[GeneratedText]) -> list[dict[str, str]]:
        return [{"text": one["generated_text"]} for one in prediction if _has_text(one)]

    def joined(self, prediction: Sequence[GeneratedText], answers: Sequence[Any]) -> list[RankedText]:
        rest = iter(answers)
        scored = [[one for one in next(rest) if one["label"] == self.label] if _has_text(p) else [] for p in prediction]
        order = sorted(range(len(scored)), key=lambda at: -scored[at][0]["score"] if scored[at] else float("inf"))
        return [cast("RankedText", {**prediction[at], "then": scored[at]}) for at in order]


AnyChain = Spans | Rerank
ChainEntry = Annotated[AnyChain, Field(discriminator="link")]
"""A chain as manifests and run files have it."""
LINKS: Mapping[str, type[AnyChain]] = {"spans": Spans, "rerank": Rerank}


def make_chain(name: str, fields: Any) -> AnyChain:
    """A chain from its fields. Raises ValueError in one sentence."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"chain {name!r} must be a mapping; found {json_type(fields)}")
    link = str(fields.get("link"))
    if link not in LINKS:
        raise ValueError(f"chain {name!r}: link {link!r} is unknown; allowed: {', '.join(LINKS)}")
    try:
        return validate(LINKS[link], {**fields, "name": name})
    except InputError as error:
        raise ValueError(f"chain {name!r}: {error}") from error


def calls(tasks: Mapping[str, Values], chains: Sequence[tuple[str, Values]]) -> list[dict[str, Values]]:
    """What to ask about the same inputs, by task: `tasks` with the first steps of chains (task, parameters) among them;
    a task that is asked with several parameters stands in several calls."""
    found: list[dict[str, Values]] = [dict(tasks)]
    for task, parameters in chains:
        there = next((one for one in found if one.get(task, parameters) == parameters), None)
        if there is None:
            found.append(there := {})
        there[task] = parameters
    return found


def grouped(flat: Sequence[T], of: Sequence[Sequence[Any]]) -> list[list[T]]:
    """One sequence cut into pieces as long as those of another one."""
    rest = iter(flat)
    return [list(islice(rest, len(some))) for some in of]


def _has_text(candidate: GeneratedText) -> bool:
    return bool(candidate["generated_text"].strip())
