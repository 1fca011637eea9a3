"""The contract of a kind of task. No torch at import time.

    example --rows--> rows --trunk, head--> logits --advance, decode--> prediction

A kind is stateless: one object serves every task of its kind; all that a task fixes is in its `Options` (stored in
the manifest), all that a request may change is in its `Parameters`. Kinds know nothing about HTTP, files or devices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from mtserve.errors import CheckpointError, InputError, Problem
from mtserve.preparation import expand
from mtserve.rows import Row
from mtserve.tasks.measures import Evaluation
from mtserve.tasks.validation import json_type, strings, validate
from mtserve.text import Limits, OnLong, Text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mtserve.tasks.calibration import Calibration
    from mtserve.tasks.work import Work

Reads = Literal["first", "last", "pooled", "all"]
Pooling = Literal["first", "last", "pooled"]
"""Which state stands for a row: that of its first or last token, or the trunk's pooler output."""
PairPooling = Pooling | Literal["pair"]
"""Or, of a pair, what both texts are to each other (heads.PairHead)."""
TEMPERATURE: Any = Field(default=1.0, gt=0, description="Divides the logits before they become scores; fitted.")
POOLING: Any = Field(
    default=None,
    description="State of a row that the head reads: training finds out and says. Or pair: what both texts are "
    "to each other as a whole and token by token.",
)
Architecture = Literal[
    "sequence_classification", "token_classification", "multiple_choice", "causal_lm", "masked_lm", "pooling", "pair"
]
Item = Any
"""One element of a request's `inputs`, as parsed from JSON."""

IGNORED = -100
"""Target of a token that no loss counts (PyTorch's cross entropy skips it)."""


class HeadSpec(BaseModel):
    """What head a task needs, as data: `mtserve.model` makes the torch module of it.

    architecture   which stock Transformers task model the head is taken from; `pooling` has no weights, `pair` is a
                   linear layer over what the two texts of a row are to each other
    labels         names of the outputs in order; their number is the width of the logits
    problem_type   as in Transformers' configs
    pooling        for `pooling`: which hidden states make the text's embedding; `mean` with `pair`: that embedding too
    reads          positions that decoding needs; None leaves it to what the head is found to depend on
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    pooling: Literal["mean", "first", "last"] | None = None
    reads: Reads | None = None

    @classmethod
    def of_rows(cls, architecture: Architecture, pooling: PairPooling | None, **more: Any) -> HeadSpec:
        """A head that answers once a row, from the state that `pooling` names."""
        if pooling == "pair":
            return cls(architecture="pair", **more)
        return cls(architecture=architecture, reads=pooling, **more)


@dataclass(frozen=True)
class LossTerms:
    """How a training weighs errors. It changes no ids, logits or labels, so it is no option and in no manifest.

    label_smoothing   share of a target that is spread evenly over all classes (Szegedy et al., 2016), in [0, 1)
    class_weights     one a class, in the order of the head's outputs
    r_drop            weight of what two passes of an example, each with dropout of its own, disagree by (Liang et al.,
                      2021); `Kind.disagreement` measures it, and the learner adds it to the loss

    Means are PyTorch's: with class weights, over the weights of the targets of this batch; so micro-batches of other
    classes have other denominators, and the mean of their means is not quite the mean of one large batch.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    r_drop: float = 0.0


PLAIN = LossTerms()


class Options(BaseModel):
    """Fixed for a task: everything that changes ids, logits or labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_length: int = Field(default=128, ge=4, description="Most tokens of a row, special tokens included.")
    append: str = Field(default="", description="At the end of every row, never cut, such as the special token <cls>.")
    on_long: OnLong = Field(default="truncate", description="What happens to longer texts.")
    stride: int = Field(default=16, ge=0, description="Tokens that neighbouring windows share.")
    preparation: tuple[str, ...] | None = Field(
        default=None, description="Text preparation of this task alone; without it the checkpoint's own steps."
    )

    @property
    def limits(self) -> Limits:
        return Limits(self.max_length, self.on_long, self.stride, self.preparation, self.append)

    @field_validator("preparation")
    @classmethod
    def _known_steps(cls, preparation: tuple[str, ...] | None) -> tuple[str, ...] | None:
        try:
            return None if preparation is None else expand(preparation)
        except CheckpointError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _stride_fits(self) -> Options:
        if self.on_long == "window" and self.stride >= self.max_length // 2:
            raise ValueError(f"stride {self.stride} must be less than half of max_length {self.max_length}")
        return self


class Parameters(BaseModel):
    """Free in a request: nothing in it changes the ids that the trunk sees of the input."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(BaseModel):
    """One input of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")


O_ = TypeVar("O_", bound=Options)
P_ = TypeVar("P_", bound=Parameters)
E_ = TypeVar("E_", bound=Example)
L_ = TypeVar("L_", bound=Example)


class Kind(Evaluation[O_, L_], Generic[O_, P_, E_, L_]):
    """One sort of task. A subclass and a line in `KINDS` add one.

    name         as in manifests and run files
    options …    the pydantic models of the kind; `labelled` is the example plus its truth
    prediction   type of one decoded output, JSON-ready; its schema goes into OpenAPI
    metric       the entry of `metrics` that stands for the task where one number is wanted
    causal       needs a trunk in which no position sees a later one
    takes_text   a bare string is an example
    label_field  the field of a prediction that holds one of the task's labels
    loss_terms   names of the `LossTerms` that the kind's loss can use
    streams      its answer grows token by token, and `emit` says what there is to read along
    """

    name: ClassVar[str]
    options: type[O_]
    parameters: type[P_]
    example: type[E_]
    labelled: type[L_]
    prediction: ClassVar[Any]
    metric: ClassVar[str]
    causal: ClassVar[bool] = False
    takes_text: ClassVar[bool] = True
    label_field: ClassVar[str | None] = None
    loss_terms: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = False

    # what the trunk sees

    @abstractmethod
    def rows(self, example: E_, options: O_, text: Text) -> list[Row]:
        """The rows of an example, ordered by part, then window. Raises InputError."""

    def texts(self, example: E_) -> Iterable[str]:
        """Texts that `rows` will ask the tokenizer for, to encode many at once; one left out costs but time."""
        return strings(example.model_dump())

    def features(self, example: L_, options: O_, text: Text) -> tuple[list[Row], Any]:
        """Rows and target of a training example; the rows are those of `rows` unless the truth is part of them."""
        rows = self.rows(self.unlabelled(example), options, text)
        return rows, self.target(example, rows, options)

    def corrupt(self, rows: list[Row], target: Any, rng: np.random.Generator) -> tuple[list[Row], Any]:
        """What one pass of training sees of an example's features: anew for each epoch, the same for an equal `rng`."""
        return rows, target

    def unlabelled(self, example: L_) -> E_:
        """The example without its truth: what a caller would send."""
        return validate(self.example, {name: getattr(example, name) for name in self.example.model_fields})

    # the head, in training

    @abstractmethod
    def head(self, options: O_) -> HeadSpec:
        """The head that the task needs."""

    @abstractmethod
    def target(self, example: L_, rows: Sequence[Row], options: O_) -> Any:
        """What the loss compares the logits of these rows with. Raises InputError for a label that is not known."""

    @abstractmethod
    def loss(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[Row]],
        targets: Sequence[Any],
        options: O_,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Mean loss, a scalar, over examples (over tokens for kinds of token outputs).

        logits: (rows, n_out), or (rows, seq, n_out) padded at the right; rows of all examples one after another.
        rows, targets: one entry an example.
        terms: only those that `loss_terms` names count.
        """

    def disagreement(
        self, logits: Tensor, other: Tensor, rows: Sequence[Sequence[Row]], targets: Sequence[Any], options: O_
    ) -> Tensor:
        """How far two passes' answers to the same rows are apart, a scalar: of distributions the mean of both
        Kullback-Leibler divergences, of scores the squared difference, in nats and units of the loss; the mean over
        what the loss is a mean of. Shapes as of `loss`. For kinds whose `loss_terms` have r_drop."""
        raise NotImplementedError(f"{self.name} has no r_drop among its loss terms")

    def fit(self, examples: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with what must be learned from the raw records of the training split (label names) filled in."""
        return dict(options)

    def classes(self, options: O_) -> Mapping[str, tuple[str, ...]]:
        """Fields of a labelled example whose texts are names of classes, with all names in order."""
        return {}

    def stated(self, options: O_, reads: Reads) -> O_:
        """Options that say what the task's head was found to read, where the kind has an option for it."""
        stated = {"pooling": reads} if reads != "all" and "pooling" in type(options).model_fields else {}
        return type(options).model_validate({**options.model_dump(), **stated})

    def calibrate(
        self, works: Sequence[Work], predictions: Sequence[Any], examples: Sequence[L_], options: O_
    ) -> Calibration | None:
        """What makes the scores of these predictions, and of finished works that they were decoded from with options
        that hold nothing fitted, mean what they say; None for a kind whose scores are no probabilities."""
        return None

    # decoding

    def advance(self, work: Work, options: O_, text: Text) -> bool:
        """Take in the logits of a step; True when the work is finished, else `work.rows` holds what comes next."""
        return True

    def check_text(self, options: O_, text: Text) -> None:
        """Raise ConfigError for options that this tokenizer cannot serve."""

    def begin(self, work: Work, options: O_, text: Text) -> None:
        """Make a fresh work of several steps ready: its `state`, its `reserved` tokens. Raises InputError."""

    def emit(self, work: Work, options: O_, text: Text) -> list[Any]:
        """JSON-ready events of what came since the last call; after the last step the one with the whole answer too."""
        return []

    @abstractmethod
    def decode(self, work: Work, options: O_, text: Text) -> Any:
        """The prediction of a finished work."""

    def check(self, example: E_, options: O_, parameters: P_) -> None:
        """Raise InputError for what the schemas cannot say of an example or its parameters."""

    def check_stream(self, options: O_, parameters: P_) -> None:
        """Raise InputError if an answer with these parameters cannot be read along."""
        raise InputError(Problem(f"an answer of {self.name} comes at once", field="stream"))

    # the edges

    @abstractmethod
    def sample(self, options: O_) -> E_:
        """One small example: for contract tests, export traces, warm-up, OpenAPI and docs."""

    def split(self, inputs: Any) -> tuple[list[Item], str]:
        """The items of a request's `inputs`, and the shape of the answer: "one" or "list" (kinds may add more)."""
        return (inputs, "list") if isinstance(inputs, list) else ([inputs], "one")

    def join(self, predictions: list[Any], shape: str) -> Any:
        """The answer to a request of that shape, as the field's clients expect it of this kind."""
        return predictions if shape == "list" else predictions[0]

    def parse(self, item: Item) -> E_:
        """An example from one item of `inputs`. Raises InputError that names every bad field."""
        if isinstance(item, str) and self.takes_text:
            item = {"text": item}
        if not isinstance(item, Mapping):
            allowed = (
                f"{'a string or ' if self.takes_text else ''}an object with {', '.join(self.example.model_fields)}"
            )
            raise InputError(f"an input of {self.name} is {allowed}; found {json_type(item)}")
        return validate(self.example, item)

    def input_models(self) -> list[type[BaseModel]]:
        """Objects that may stand in `inputs` of an HTTP request, each alone; the example may also stand in a list."""
        return [self.example]

    def flat_types(self, options: O_) -> Mapping[str, Any]:
        """Columns in which a table has the gist of a prediction, and their types."""
        return {"prediction": self.prediction}

    def flat(self, prediction: Any, options: O_) -> Mapping[str, Any]:
        """A prediction in those columns."""
        return {"prediction": prediction}

    def label_names(self, options: O_) -> tuple[str, ...]:
        """The labels that a prediction can carry, for listings and OpenAPI; empty where there are none."""
        return ()

    def answer_schema(self, options: O_) -> dict[str, Any]:
        """JSON schema of one prediction."""
        return TypeAdapter(self.prediction).json_schema(ref_template="#/components/schemas/{model}")


AnyKind = Kind[Any, Any, Any, Any]
