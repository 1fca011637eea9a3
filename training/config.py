"""A run as data: tasks, their splits, how the weights are changed. Reads no files, no examples and no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from mtserve.chains import ChainEntry, make_chain
from mtserve.errors import CheckpointError, ConfigError
from mtserve.manifest import TaskName
from mtserve.preparation import expand
from mtserve.tasks import KINDS
from mtserve.tasks.base import AnyKind
from training.data.source import Source
from training.pretraining import TRAINING_KINDS
from training.section import Section
from training.special_tokens import PRESETS, Role
from training.trainer.arguments import FROM_RUN_FILE
from training.trainer.lora import Lora
from training.trainer.mixture import MixtureConfig


class Carve(Section):
    """A split taken out of the training source: a share of its records, or about that share of the groups that the
    column `by` makes. No split gets the share `skip`, which is what `carve: skip` would take: so settings are tuned
    without the part that results are reported on."""

    carve: float = Field(gt=0, lt=1)
    seed: int = Field(default=0, ge=0)
    by: str | None = None
    skip: float = Field(default=0, ge=0, lt=1)

    @property
    def shown(self) -> str:
        """The part in a few words, for people."""
        kept_out = f", {self.skip:g} kept out" if self.skip else ""
        return f"{self.carve:g} of train{'' if self.by is None else f' by {self.by}'}, seed {self.seed}{kept_out}"


def _form(value: Any) -> str:
    return ":carve" if isinstance(value, Carve) or (isinstance(value, Mapping) and "carve" in value) else ":source"


Held = Annotated[Annotated[Source, Tag(":source")] | Annotated[Carve, Tag(":carve")], Discriminator(_form)]
"""A split that training does not see: a source of its own, or a part of the training source."""


class JudgeConfig(Section):
    """Who says whether an answer has the wanted style: a classification in a sealed checkpoint (a folder, or one of the
    hub), best one on another trunk, and the label that answers should get."""

    checkpoint: str
    task: str
    label: str


class TaskConfig(Section):
    """One task: its kind, its data, and its share of the loss. The last two keys are of generation alone."""

    kind: str
    options: dict[str, Any] = Field(default={})
    train: Source
    eval: Held
    test: Held | None = None
    weight: float = Field(default=1.0, gt=0)
    batch_size: int | None = Field(default=None, ge=1)
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    r_drop: float = Field(default=0.0, ge=0, description="Two passes with other dropout should agree; how much.")
    license: str | None = Field(default=None, description="The licence of the data, for the card.")
    zero_shot: str | None = Field(default=None, description="Template for the untrained trunk, measured beside ours.")
    judge: JudgeConfig | None = None

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind not in TRAINING_KINDS:
            raise ValueError(f"{kind!r} is no kind of task; allowed: {', '.join(TRAINING_KINDS)}")
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        _among("option", self.options, self.handler.options)
        carved = [part for part in (self.eval, self.test) if isinstance(part, Carve)]
        for source in (self.train, *(part for part in (self.eval, self.test) if isinstance(part, Source))):
            _among("example field", source.columns, self.handler.labelled)
        if self.kind != "generation" and (self.zero_shot is not None or self.judge is not None):
            raise ValueError(f"zero_shot and judge are of generated text; allowed: neither with {self.kind}")
        if len({(part.seed, part.by, part.skip) for part in carved}) > 1:
            raise ValueError("eval and test are carved with other seeds, groups or skip; allowed: the same for both")
        if sum(part.carve for part in carved) + sum(part.skip for part in carved[:1]) >= 1:
            raise ValueError("eval and test are carved out of train and leave nothing; allowed: less than 1 in all")
        return self

    @property
    def handler(self) -> AnyKind:
        return TRAINING_KINDS[self.kind]


class Training(Section):
    """How the weights are changed; batch sizes count examples on one device, learning rates are those after warm-up."""

    epochs: float = Field(default=3.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0, description="From the start of the run; sealing comes after.")
    learning_rate: float = Field(default=5e-5, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1, description="Rate of a layer over that above it.")
    freeze: tuple[str, ...] = Field(default=(), description="embeddings, trunk, layers:N, or patterns of names.")
    lora: Lora | None = Field(default=None, description="Train low-rank adapters of the trunk, merged at the end.")
    mixout: float = Field(default=0.0, ge=0, lt=1, description="Share of the trunk's numbers put back for a step.")
    optimizer: str = Field(default="adamw_torch_fused", description="As in TrainingArguments.optim.")
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    scheduler: str = Field(default="linear", description="As in TrainingArguments.lr_scheduler_type.")
    bf16: Literal[True, False, "auto"] = Field(default=False, description="auto: where the device multiplies bf16.")
    fp16: bool = False
    logging_steps: int = Field(default=10, ge=1)
    eval_steps: int | None = Field(default=None, ge=1, description="Steps between evaluations; none means at the end.")
    save_steps: int | None = Field(default=None, ge=1, description="Steps between states to resume from.")
    best: str | None = Field(default=None, description="average, or task.metric: keep the weights that are best by it.")
    patience: int | None = Field(default=None, ge=1, description="Stop after so many evaluations without a better one.")
    report_to: tuple[str, ...] = ()
    gradient_cosines: int = Field(default=0, ge=0, description="Moments at which tasks' gradients are measured.")
    arguments: dict[str, Any] = Field(default={}, description="Further TrainingArguments.")

    @field_validator("freeze", "report_to", mode="before")
    @classmethod
    def _one_or_several(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @field_validator("arguments")
    @classmethod
    def _supported(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if name not in FROM_RUN_FILE:
                raise ValueError(f"{name!r} cannot be given here; allowed: {', '.join(sorted(FROM_RUN_FILE))}")
        return arguments

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if (self.best is not None) != (self.eval_steps is not None):
            raise ValueError("best needs eval_steps, and eval_steps needs best (average, or task.metric)")
        if self.patience is not None and self.best is None:
            raise ValueError("patience needs best and eval_steps")
        if self.mixout and (self.lora is not None or self.gradient_checkpointing):
            other = "gradient_checkpointing draws anew" if self.lora is None else "lora leaves the trunk's weights"
            raise ValueError(f"mixout: {other}; allowed: one without the other")
        if self.best is not None and self.save_steps not in (None, self.eval_steps):
            raise ValueError("with best, states are saved at every evaluation; allowed: save_steps left out")
        return self


class RunConfig(Section):
    """A whole run. Data paths and a trunk's path are relative to the run file (or to `data_dir`, which is relative to
    the working directory, as is `output`)."""

    trunk: str
    trunk_name: str | None = Field(default=None, description="What the card calls the trunk; by default its location.")
    output: str
    result: Literal["checkpoint", "trunk", "heads"] = Field(
        default="checkpoint", description="What is written: heads are added to the checkpoint that `trunk` names."
    )
    overwrite: bool = False
    resume: bool = Field(default=False, description="Go on from the last saved state of this very run.")
    seed: int = Field(default=0, ge=0)
    license: str | None = None
    data_dir: str | None = None
    preparation: tuple[str, ...] = Field(default=(), description="Text preparation: steps, or the name of a preset.")
    preparations: dict[str, tuple[str, ...]] = Field(
        default={}, description="Another one for trunks of these names, the last part of where they are."
    )
    special_tokens: dict[Role, str] = Field(
        default={}, description="Tokens that the trunk gets: bos, eos, pad, cls to their texts, or a preset's name."
    )
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    chains: dict[TaskName, ChainEntry] = Field(default={}, description="Of tasks of this run, for the checkpoint.")
    training: Training = Training()
    mixture: MixtureConfig = MixtureConfig()
    on_bad_record: Literal["stop", "skip"] = "stop"
    limit: int | None = Field(default=None, ge=1, description="Only so many records of a source, to try a run.")
    calibrate: bool = Field(default=False, description="Fit temperature and thresholds on the evaluation splits.")
    golden_rows: int = Field(default=4, ge=0)
    calibration_rows: int = Field(default=200, ge=0)
    resamples: int = Field(default=1000, ge=0, description="Bootstrap resamples of the metrics' intervals.")

    @model_validator(mode="before")
    @classmethod
    def _chained(cls, raw: Any) -> Any:
        """Chains that are none of this run's, as a form or an override sets them or one of their tasks to null, go."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("chains"), Mapping):
            return raw
        tasks = raw.get("tasks")
        absent = [name for name, of in tasks.items() if of is None] if isinstance(tasks, Mapping) else []
        made = [make_chain(str(name), of) for name, of in raw["chains"].items() if of is not None]
        return {**raw, "chains": {one.name: one for one in made if not {one.first, one.then} & {*absent}}}

    @field_validator("tasks", mode="before")
    @classmethod
    def _left_out(cls, tasks: Any) -> Any:
        """A task that a form or an override sets to null is none of this run's."""
        return {name: of for name, of in tasks.items() if of is not None} if isinstance(tasks, Mapping) else tasks

    @field_validator("special_tokens", mode="before")
    @classmethod
    def _preset(cls, tokens: Any) -> Any:
        if not isinstance(tokens, str):
            return tokens
        if tokens not in PRESETS:
            raise ValueError(f"{tokens!r} is no preset; allowed: {', '.join(PRESETS)}, or a mapping of roles to tokens")
        return dict(PRESETS[tokens])

    @field_validator("preparation", mode="before")
    @classmethod
    def _steps(cls, preparation: Any) -> Any:
        try:
            return expand([preparation] if isinstance(preparation, str) else preparation)
        except CheckpointError as error:
            raise ValueError(str(error)) from error

    @field_validator("preparations", mode="before")
    @classmethod
    def _steps_by_trunk(cls, preparations: Any) -> Any:
        of = preparations.items() if isinstance(preparations, Mapping) else ()
        return {trunk: cls._steps(steps) for trunk, steps in of} or preparations

    @model_validator(mode="after")
    def _heads_alone(self) -> RunConfig:
        if self.result == "heads":
            for name, value in {
                "special_tokens": self.special_tokens,
                "preparations": self.preparations,
                "training.freeze": self.training.freeze,
                "training.lora": self.training.lora,
                "training.mixout": self.training.mixout,
                "training.gradient_cosines": self.training.gradient_cosines,
            }.items():
                if value:
                    raise ValueError(f"{name}: with result: heads the trunk stays as it is; allowed: to leave it out")
            for name, task in self.tasks.items():
                if task.r_drop:
                    raise ValueError(f"tasks.{name}.r_drop: kept outputs have no dropout; allowed: to leave it out")
                if task.kind not in KINDS:
                    raise ValueError(f"tasks.{name}: {task.kind} only trains a trunk; allowed: {', '.join(KINDS)}")
        return self

    @model_validator(mode="after")
    def _chains_fit(self) -> RunConfig:
        if self.chains and self.result != "checkpoint":
            raise ValueError("chains: allowed with result: checkpoint (else `mtserve chains add` afterwards)")
        for name, chain in self.chains.items():
            if name in self.tasks or not {chain.first, chain.then} <= set(self.tasks):
                raise ValueError(f"chains.{name}: wanted are another name and two of {', '.join(self.tasks)}")
        return self

    @model_validator(mode="after")
    def _new_rows_are_trained(self) -> RunConfig:
        if self.training.lora is not None and self.special_tokens:
            found = "special_tokens are new rows of the embeddings, which adapters leave as they are"
            raise ValueError(f"training.lora: {found}; allowed: one without the other")
        return self

    @model_validator(mode="after")
    def _something_to_seal(self) -> RunConfig:
        if self.result == "checkpoint" and not any(task.kind in KINDS for task in self.tasks.values()):
            raise ValueError("tasks: none can be served, so there is no checkpoint to seal; allowed: result: trunk")
        return self

    @model_validator(mode="after")
    def _mixture_names_tasks(self) -> RunConfig:
        try:
            self.mixture.check(self.tasks)
        except ConfigError as error:
            raise ValueError(f"mixture: {error}") from error
        return self

    @property
    def steps(self) -> tuple[str, ...]:
        """The text preparation for the trunk of this run."""
        name = self.trunk.partition("@")[0].rstrip("/").rsplit("/", 1)[-1]
        return self.preparations.get(name, self.preparation)

    def data_home(self, base: Path) -> Path:
        """What data paths are relative to; `base` is that of the run file."""
        return base if self.data_dir is None else Path(self.data_dir)

    def batch_size(self, task: str) -> int:
        """Examples in a batch of one task on one device."""
        return self.tasks[task].batch_size or self.training.batch_size

    @property
    def sealed(self) -> list[str]:
        """The tasks that a checkpoint will hold: those that only train the trunk are left out."""
        return [name for name, task in self.tasks.items() if task.kind in KINDS]


def _among(what: str, found: Mapping[str, Any], model: type[BaseModel]) -> None:
    for name in found:
        if name not in model.model_fields:
            raise ValueError(f"unknown {what} {name!r}; allowed: {', '.join(model.model_fields)}")
