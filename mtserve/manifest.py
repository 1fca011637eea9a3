"""The manifest of a checkpoint, `mtserve.json`, as data: shape, rules, version gate. Reads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mtserve.bundle import GRAPHS, Exported
from mtserve.chains import AnyChain, ChainEntry, Member
from mtserve.errors import CheckpointError
from mtserve.tasks import KINDS
from mtserve.tasks.base import AnyKind, Options
from mtserve.text import TextSpec

FORMAT, WITH_CHAINS = 1, 2
"""Formats: a manifest with chains has another one, so that who knows no chains refuses it and reads all others."""
MANIFEST = "mtserve.json"
TASK_NAME = r"[a-z0-9][a-z0-9_.-]{0,63}"


def check_task_name(name: str) -> str:
    """The name itself: it is a folder, a URL and a column too. Raises ValueError."""
    if not re.fullmatch(TASK_NAME, name):
        raise ValueError(f"{name!r} is no task name; allowed: {TASK_NAME}")
    return name


def check_kind(kind: str) -> str:
    """The name itself. Raises ValueError if no kind has it."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of task; allowed: {', '.join(KINDS)}")
    return kind


def format_of(chains: Collection[AnyChain]) -> int:
    """The format of a manifest with these chains."""
    return WITH_CHAINS if chains else FORMAT


TaskName = Annotated[str, AfterValidator(check_task_name)]
KindName = Annotated[str, AfterValidator(check_kind)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TrunkEntry(_Entry):
    """The trunk: `max_length` is the most tokens that its positions allow, None where they set no limit."""

    fingerprint: str
    weights: str
    family: str
    causal: bool
    hidden_size: int
    max_length: int | None
    parameters: int
    source: str


class TaskEntry(_Entry):
    """One task: `trunk` is the fingerprint that its head was trained on; paths are None where there is no file."""

    name: TaskName
    kind: KindName
    options: dict[str, Any]
    trunk: str
    weights: str | None
    config: str | None
    tied: dict[str, str] = {}
    golden: str | None = None
    calibration: str | None = None
    metrics: dict[str, float] = {}

    @model_validator(mode="after")
    def _options_fit(self) -> TaskEntry:
        try:
            _ = self.parsed_options
        except ValidationError as error:
            raise ValueError(f"options of task {self.name!r}: {first_problem(error)}") from error
        return self

    @property
    def handler(self) -> AnyKind:
        return KINDS[self.kind]

    @property
    def parsed_options(self) -> Options:
        """The options as the kind's own class."""
        parsed: Options = self.handler.options.model_validate(self.options)
        return parsed


class Speed(_Entry):
    """How fast a profile was on one sort of hardware, and what was best there.

    tokens_per_s   real tokens, with as many threads as there were cores
    cores          usable ones; the threads hold where there are as many
    threads        with which the profile that was chosen was fastest; of others None
    keep_memory    whether that one was faster when the allocator keeps what is freed; of others None
    versions       of what computed
    measured       the day, UTC
    """

    tokens_per_s: float = Field(gt=0)
    cores: int = Field(ge=1)
    threads: int | None = Field(default=None, ge=1)
    keep_memory: bool | None = None
    versions: dict[str, str] = {}
    measured: str = ""


class Change(_Entry):
    """By how much a task's metric differs from fp32's over all its calibration rows: 95 % are from `low` to `high`, by
    a paired bootstrap. `flips` of its `rows` are decided otherwise; `difference` is the largest of a logit, as golden
    rows measure it (of a bundle; of kinds of several steps 0)."""

    metric: str
    fp32: float
    change: float
    low: float
    high: float
    flips: int = Field(ge=0)
    rows: int = Field(ge=1)
    difference: float | None = None


class Profile(_Entry):
    """An accepted way to run the checkpoint: logits may differ from the golden ones by `tolerance` times the larger
    of 1 and the largest golden logit. What follows is what `mtserve tune` measured; nothing of it where it never ran.

    flips, rows   decided otherwise than in fp32, of how many calibration rows of all tasks
    max_flips     the largest share that was allowed
    tasks         what became of each task's metric
    speeds        by hardware key
    """

    tolerance: float = Field(gt=0)
    flips: int | None = Field(default=None, ge=0)
    rows: int | None = Field(default=None, ge=0)
    max_flips: float | None = None
    tasks: dict[str, Change] = {}
    speeds: dict[str, Speed] = {}


FP32 = Profile(tolerance=1e-4)
"""What a checkpoint accepts that was never tuned, under the name `fp32`."""


class Manifest(_Entry):
    """All that is said of a folder. `exported` speaks of a bundle's graphs; there is none of a checkpoint."""

    format: int
    artefact: Literal["checkpoint", "bundle"] = "checkpoint"
    written_by: str
    trunk: TrunkEntry
    text: TextSpec
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    chains: tuple[ChainEntry, ...] = ()
    profiles: dict[str, Profile] = {"fp32": FP32}
    exported: Exported | None = None
    files: dict[str, FileEntry]
    provenance: dict[str, Any] = {}

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
                raise ValueError(f"{name!r} is not a plain path inside the checkpoint")
        return files

    @property
    def names(self) -> list[str]:
        """Of tasks, then of chains."""
        return [one.name for one in (*self.tasks, *self.chains)]

    @property
    def members(self) -> dict[str, Member]:
        """What chains know of the tasks."""
        return {task.name: Member(task.handler, task.parsed_options) for task in self.tasks}

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without chains nothing is said of them, as in the format that had none."""
        said: dict[str, Any] = dump(self)
        return said if self.chains else {name: value for name, value in said.items() if name != "chains"}

    def tolerance(self, profile: str) -> float:
        """That of an accepted profile. Raises CheckpointError for another one."""
        if profile not in self.profiles:
            accepted = ", ".join(self.profiles) or "none"
            raise CheckpointError(
                f"profile {profile} is not accepted by the checkpoint; accepted: {accepted} (`mtserve tune` measures "
                "others)"
            )
        return self.profiles[profile].tolerance

    @property
    def accepted(self) -> dict[str, dict[str, float]]:
        """Accepted profiles with their measured tokens a second by hardware key."""
        return {
            name: {key: speed.tokens_per_s for key, speed in profile.speeds.items()}
            for name, profile in self.profiles.items()
        }

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [task.name for task in self.tasks]
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"task names must be distinct; found {', '.join(self.names)}")
        self._check_chains()
        if (self.exported is None) != (self.artefact == "checkpoint"):
            raise ValueError(f"a {self.artefact} has {'no' if self.exported is None else 'exported'} graphs")
        used = [self.trunk.weights, "tokenizer.json"]
        if self.exported is None:
            used += ["trunk/config.json"]
        else:
            used += [GRAPHS, *(head.path for head in self.exported.heads.values())]
            if [*self.exported.heads] != names:
                raise ValueError(f"heads of {', '.join(self.exported.heads)} for tasks {', '.join(names)}")
        for task in self.tasks:
            used += [path for path in (task.weights, task.config, task.golden, task.calibration) if path is not None]
            if task.trunk != self.trunk.fingerprint:
                raise ValueError(
                    f"the head of task {task.name!r} was trained on trunk {task.trunk[:12]}, "
                    f"this checkpoint holds {self.trunk.fingerprint[:12]}"
                )
            check_against_trunk(task, self.trunk)
        for path in used:
            if path not in self.files:
                raise ValueError(f"{path!r} is used but not listed under files")
        return self

    def _check_chains(self) -> None:
        if self.format != format_of(self.chains):
            raise ValueError(f"format {self.format} with {len(self.chains)} chains; needed: {format_of(self.chains)}")
        members = self.members if self.chains else {}
        for chain in self.chains:
            check_task_name(chain.name)
            chain.check(members)


class GoldenRow(_Entry):
    """An input with what the trunk saw of it and the logits that came out, one entry a row; of wide outputs the first
    `GOLDEN_WIDTH` logits."""

    input: dict[str, Any]
    ids: list[list[int]]
    logits: list[Any]


GOLDEN_WIDTH = 256


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises CheckpointError if it is missing, damaged or of a newer format."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found not in (FORMAT, WITH_CHAINS):
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT} and {WITH_CHAINS}")
    return checked_manifest(raw, path)


def checked_manifest(raw: Mapping[str, Any], path: Path) -> Manifest:
    """A manifest from its JSON form. Raises CheckpointError with the first rule that it breaks."""
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    found = error.errors(include_url=False)[0]
    where = ".".join(map(str, found["loc"]))
    return f"{where + ': ' if where else ''}{found['msg'].removeprefix('Value error, ')}"


def check_against_trunk(task: TaskEntry, trunk: TrunkEntry) -> None:
    """Raise ValueError if the trunk cannot do what the task's options ask of it."""
    options = task.parsed_options
    if trunk.max_length is not None and options.max_length > trunk.max_length:
        found = f"max_length {options.max_length} is over the {trunk.max_length} positions of its trunk"
        raise ValueError(f"task {task.name!r}: {found}")
    if task.handler.causal and not trunk.causal:
        raise ValueError(f"task {task.name!r}: {task.kind} needs a causal trunk; {trunk.family} is none")
