"""What a row of answers looks like: cells of the input, then those of each task, then what went wrong.

nested   a column a task, named as it is, with the prediction as over HTTP
flat     columns TASK_NAME, as each kind says (`Kind.flat`); with `all_scores` the whole prediction beside them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mtserve.chains import AnyChain
from mtserve.errors import ConfigError, MtserveError
from mtserve.tasks.base import AnyKind, Options

Form = Literal["nested", "flat"]
ERROR = "error"
FAULT: Mapping[str, Any] = {"code": str, "message": str, "row": int, "file": str}
"""Of an error: its code, what is wrong, and where: the row's number in its file, from 0."""


@dataclass(frozen=True)
class Shape:
    """Columns of the output.

    tasks   names of tasks and chains, what says the columns of each, and the options by which it does
    keep    columns of the input that go through, in their order; None for all
    """

    form: Form
    tasks: Sequence[tuple[str, AnyKind | AnyChain, Options]]
    keep: tuple[str, ...] | None = None
    all_scores: bool = False

    @property
    def added(self) -> dict[str, Any]:
        """Types of the columns that answers add, by name, as Python writes types."""
        found: dict[str, Any] = {}
        for task, kind, options in self.tasks:
            if self.form == "nested":
                found[task] = kind.prediction
                continue
            found |= {f"{task}_{name}": of for name, of in kind.flat_types(options).items()}
            if self.all_scores:
                found[f"{task}_scores"] = kind.prediction
        if self.form == "nested":
            return {**found, ERROR: FAULT}
        return {**found, **{f"{ERROR}_{name}": of for name, of in FAULT.items()}}

    def kept(self, cells: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.keep is None:
            return cells
        return {name: cells[name] for name in self.keep if name in cells}

    def check(self, names: Sequence[str]) -> None:
        """Raise ConfigError for a column of the input that has the name of one of the output."""
        if both := [name for name in names if name in self.added and (self.keep is None or name in self.keep)]:
            raise ConfigError(f"input and output both have a column {both[0]}; name those to keep: --keep COLUMN")

    def row(self, cells: Mapping[str, Any], answers: Mapping[str, Any], where: tuple[str, int]) -> dict[str, Any]:
        """Cells of an output row; an answer that is an exception is null there, and its error is told."""
        found = dict(self.kept(cells))
        failed = {task: one for task, one in answers.items() if isinstance(one, Exception)}
        for task, kind, options in self.tasks:
            answer = answers.get(task)
            if self.form == "nested":
                found[task] = None if task in failed else answer
                continue
            nothing = dict.fromkeys(kind.flat_types(options))
            flat = nothing if task in failed or answer is None else kind.flat(answer, options)
            found |= {f"{task}_{name}": value for name, value in flat.items()}
            if self.all_scores:
                found[f"{task}_scores"] = None if task in failed else answer
        error = fault(failed, len(self.tasks), where) if failed else None
        if self.form == "nested":
            return {**found, ERROR: error}
        return {**found, **{f"{ERROR}_{name}": (error or {}).get(name) for name in FAULT}}


def fault(failed: Mapping[str, Exception], tasks: int, where: tuple[str, int]) -> dict[str, Any]:
    """What went wrong with a row; said of each task where it is not the same with all."""
    said = {task: str(error) for task, error in failed.items()}
    first = next(iter(failed.values()))
    same = len(set(said.values())) == 1 and len(said) == tasks
    message = str(first) if same else "; ".join(f"task {task!r}: {text}" for task, text in said.items())
    code = first.code if isinstance(first, MtserveError) else MtserveError.code
    file, row = where
    return {"code": code, "message": message, "row": row, "file": file}
