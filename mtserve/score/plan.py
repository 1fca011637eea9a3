"""What a run is to do, as data: settings, and the plan that follows from them and the first rows of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mtserve.chains import AnyChain
from mtserve.engine import Task
from mtserve.errors import ConfigError, MissingExtraError, UnknownTaskError
from mtserve.score.columns import Columns
from mtserve.score.cutting import Limits
from mtserve.score.places import Format, Place
from mtserve.score.records import read, schema
from mtserve.score.scorer import Asked
from mtserve.score.shape import Shape
from mtserve.score.writing import names_of, schema_of

_LOOK = 1024
_TABLES: tuple[Format, ...] = ("parquet", "arrow")


class TaskSettings(BaseModel):
    """Of one task.

    columns      field of an example -> column, beside those of all tasks
    parameters   as in a request
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: dict[str, str | tuple[str, ...]] = {}
    parameters: dict[str, Any] = {}


class Settings(BaseModel):
    """How rows are scored; what a file of settings may hold.

    tasks        by name, chains too; a model of one task needs none
    columns      field of an example -> column, for all tasks that have the field
    form         nested or flat; by default nested in JSONL, flat elsewhere
    keep         columns of the input that go through; None for all
    all_scores   whole predictions beside flat columns
    metrics      measure rows that have a truth, by the functions of training
    max_errors   how many rows may fail before the run stops
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: dict[str, TaskSettings] = {}
    columns: dict[str, str | tuple[str, ...]] = {}
    form: Literal["nested", "flat"] | None = None
    keep: tuple[str, ...] | None = None
    all_scores: bool = False
    metrics: bool = False
    max_errors: int | None = Field(default=None, ge=0)


def asked(known: Mapping[str, Task], settings: Settings, chains: Mapping[str, AnyChain]) -> list[Asked]:
    """The tasks and chains with their columns. Raises UnknownTaskError, ConfigError, InputError for a chain's
    parameters."""
    if settings.metrics and any(find_spec(name) is None for name in ("sklearn", "scipy", "sacrebleu")):
        raise MissingExtraError("measuring answers", "train")
    names = [*settings.tasks] or ([*known] if len(known) == 1 else [])
    if not names:
        raise ConfigError(f"choose --task from {', '.join([*known, *chains])}")
    found, fields = [], set[str]()
    for name in names:
        chain, own = chains.get(name), settings.tasks.get(name, TaskSettings())
        task = known.get(name if chain is None else chain.first)
        if task is None:
            raise UnknownTaskError(name, [*known, *chains])
        of_kind = set(task.kind.labelled.model_fields if chain is None else task.kind.example.model_fields)
        if chain is not None:
            _check_chain(chain, own, known, of_kind)
        fields |= of_kind
        shared = {field: of for field, of in settings.columns.items() if field in of_kind}
        columns = Columns(task.kind, shared | own.columns)
        found.append(Asked(task, columns, own.parameters, settings.metrics and chain is None, chain))
    if unknown := sorted(set(settings.columns) - fields):
        raise ConfigError(f"no task has a field {unknown[0]}; allowed: {', '.join(sorted(fields))}")
    return found


def _check_chain(chain: AnyChain, own: TaskSettings, known: Mapping[str, Task], fields: set[str]) -> None:
    chain.steps(own.parameters, known)
    if unknown := sorted(set(own.columns) - fields):
        raise ConfigError(f"chain {chain.name!r} is not measured and has no {unknown[0]}; allowed: {', '.join(fields)}")


def limits_for(tasks: Sequence[Task], part_rows: int | None) -> Limits:
    """Fewer rows in a part, as in a window, where an answer takes many steps."""
    rows = part_rows or (512 if any(task.kind.causal for task in tasks) else Limits.part_rows)
    return Limits(part_rows=rows, window_rows=min(rows, Limits.window_rows))


def shape(tasks: Sequence[Asked], settings: Settings, output: Format) -> Shape:
    form = settings.form or ("nested" if output == "jsonl" else "flat")
    if form == "nested" and output in ("csv", "tsv"):
        raise ConfigError(f"{output} has no nested columns; allowed: form flat")
    said = [(one.name, one.chain or one.task.kind, one.task.options) for one in tasks]
    return Shape(form, said, settings.keep, settings.all_scores)


def columns_plan(places: Sequence[Place], tasks: Sequence[Asked], shape: Shape, output: Format) -> dict[str, Any]:
    """Columns of the output by the first rows of the first file that has any, and a check that the tasks find theirs.
    Raises ConfigError."""
    first: list[Mapping[str, Any]] = []
    known = None
    for place in places:
        known = schema(place, shape.keep)
        first = [record.cells for record in islice(read(place), _LOOK) if record.problem is None]
        if first:
            break
    names = list(dict.fromkeys(str(name) for cells in first for name in cells))
    if shape.keep is not None and first and (missing := [name for name in shape.keep if name not in names]):
        raise ConfigError(f"there is no column {missing[0]} to keep; the input has {', '.join(names)}")
    shape.check(names)
    if first:
        for one in tasks:
            one.columns.check(names, one.name, labels=one.labelled)
    kept = [shape.kept(cells) for cells in first]
    if output in ("csv", "tsv"):
        return {"names": names_of(kept, shape.added)}
    return {"schema": schema_of(kept, shape.added, known=known).hex()} if output in _TABLES else {}


def key(
    *, model: Mapping[str, Any], inputs: Sequence[tuple[str, str]], settings: Settings, limits: Limits, **more: Any
) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was broken off."""
    return {
        "format": 1,
        "model": model,
        "inputs": [{"file": url, "content": content} for url, content in inputs],
        "settings": settings.model_dump(mode="json", exclude={"max_errors"}),
        "cuts": vars(limits),
        **more,
    }
